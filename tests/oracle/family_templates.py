"""Chat templates in the styles of Qwen2.5 and SmolLM3, which `templates` has not; written for these tests, none is a copy.

Tagged as there. Mistral's, Qwen3's and GLM's styles are in `templates`.
"""

from __future__ import annotations

# A system message of its own where there is none; tools in it; calls in <tool_call>, answers of tools as a user's turn.
QWEN25 = """\
{%- set given = messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + (messages[0].content if given else 'You are Qwen, a helpful assistant.') }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nFunctions you may call:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nWrite a call as JSON within <tool_call></tool_call>.' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
{%- generation %}
        {%- if message.content %}
            {{- message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
{%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# A system message that always says the date and the mode; without thoughts an empty block of them before every answer.
SMOLLM3 = """\
{%- set given = messages[0].content if messages[0].role == 'system' else '' %}
{%- set thinks = '/no_think' not in given %}
{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y') + '\\n' }}
{{- 'Reasoning Mode: ' + ('/think' if thinks else '/no_think') + '\\n\\n' }}
{%- if given %}
    {{- '## Custom Instructions\\n\\n' + given.replace('/no_think', '').replace('/think', '').rstrip() + '\\n\\n' }}
{%- endif %}
{%- if tools %}
    {{- '### Tools\\n\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '</tools>\\n\\n' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
{%- generation %}
        {%- if thinks %}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<think>\\n\\n</think>\\n' + content.lstrip('\\n') }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' }}
            {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
            {{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
{%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

FAMILY_TAGGED: dict[str, str] = {"qwen2.5": QWEN25, "smollm3": SMOLLM3}
