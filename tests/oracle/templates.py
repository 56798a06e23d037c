"""Chat templates in the styles of published models, each with a twin that marks what the model has to write.

Written for these tests after the published formats; none is a copy. A source here is the tagged twin, with
`{%- generation %}` and `{%- endgeneration %}` on lines of their own, which render as nothing; `TEMPLATES` has the
sources without these lines, `TAGGED` has them as they are. What is marked: from right behind what
`add_generation_prompt` writes (an assistant's header is no target) to the end-of-turn token and with it, not the
newline behind it; without such a token to the answer's last character.
"""

from __future__ import annotations

import re

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set text = (system if loop.first else '') + message['content'] %}
        {{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
{%- generation %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

# No bos_token where the tokenizer has none; tools in the first user's turn; only one call in a turn.
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in turns %}
    {%- if loop.first and tools is not none %}
        {%- if message['role'] != 'user' %}
            {{- raise_exception('tools go into the first turn, which has to be the user\\'s') }}
        {%- endif %}
        {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with the JSON of a call where one helps.\\n\\n' }}
        {%- for tool in tools %}
            {{- tool | tojson(indent=4) }}
            {{- '\\n\\n' }}
        {%- endfor %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('one call in a turn') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- generation %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
{%- endgeneration %}
    {%- elif message['role'] == 'tool' or message['role'] == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- generation %}
        {{- message['content'] | trim + '<|eot_id|>' }}
{%- endgeneration %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Thinking stays behind the last question only, and there a <think> block is written even where there is none.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nThe signatures of functions that may be called:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nA call is JSON within <tool_call></tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and message.content is string
           and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
{%- generation %}
        {%- if loop.index0 > ns.last_query and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if content or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
{%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# The system text comes first, wherever it stood. Behind a tool's outputs the assistant has no header.
# The generation prompt's <think> is dropped with what was thought; where it stays, it is no target either.
R1 = """\
{%- set ns = namespace(system='', outputs=false) %}
{%- for message in messages if message['role'] == 'system' %}
    {%- set ns.system = message['content'] %}
{%- endfor %}
{{- bos_token }}
{{- ns.system }}
{%- for message in messages %}
    {%- if message['role'] != 'tool' and ns.outputs %}
        {{- '<｜tool▁outputs▁end｜>' }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set ns.outputs = false %}
        {{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {%- if not ns.outputs %}
            {{- '<｜Assistant｜>' }}
        {%- endif %}
        {%- set ns.outputs = false %}
        {%- set text = (message['content'] or '').split('</think>')[-1] %}
        {%- if text.startswith('<think>\\n') %}
            {{- '<think>\\n' }}
            {%- set text = text[8:] %}
        {%- endif %}
{%- generation %}
        {{- text }}
        {%- if message.tool_calls %}
            {{- '<｜tool▁calls▁begin｜>' }}
            {%- for call in message.tool_calls %}
                {{- '' if loop.first else '\\n' }}
                {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name }}
                {{- '\\n```json\\n' + call.function.arguments | tojson + '\\n```<｜tool▁call▁end｜>' }}
            {%- endfor %}
            {{- '<｜tool▁calls▁end｜>' }}
        {%- endif %}
        {{- '<｜end▁of▁sentence｜>' }}
{%- endgeneration %}
    {%- elif message['role'] == 'tool' %}
        {{- '\\n' if ns.outputs else '<｜tool▁outputs▁begin｜>' }}
        {%- set ns.outputs = true %}
        {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if ns.outputs %}
    {{- '<｜tool▁outputs▁end｜>' }}
{%- elif add_generation_prompt %}
    {{- '<｜Assistant｜><think>\\n' }}
{%- endif %}
"""

# The system text and the tools go into the last user's turn; there is no generation prompt.
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set ns = namespace(index=0, last_user=-1) %}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {%- set ns.last_user = loop.index0 %}
    {%- endif %}
    {%- if message['role'] == 'user' or (message['role'] == 'assistant' and message.tool_calls is not defined) %}
        {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('user and assistant take turns') }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {%- if loop.index0 == ns.last_user and tools %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.index0 == ns.last_user and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
{%- generation %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('the id of a call has 9 characters') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']' + eos_token }}
{%- endgeneration %}
    {%- elif message['role'] == 'assistant' %}
{%- generation %}
        {{- ' ' + message['content'] | trim + eos_token }}
{%- endgeneration %}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string | tojson }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
{%- endfor %}
"""

# The generation prompt is written behind the last message only, from within the loop.
ZEPHYR = """\
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<|user|>\\n' + message['content'] + eos_token + '\\n' }}
    {%- elif message['role'] == 'system' %}
        {{- '<|system|>\\n' + message['content'] + eos_token + '\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>\\n' }}
{%- generation %}
        {{- message['content'] + eos_token }}
{%- endgeneration %}
        {{- '\\n' }}
    {%- endif %}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|assistant|>\\n' }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('there is no system role') }}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant take turns') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' }}
    {%- if role == 'model' %}
{%- generation %}
        {{- message['content'] | trim + '<end_of_turn>' }}
{%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<end_of_turn>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

# No end token: a turn ends where the next begins. The newline and the blank are behind the generation prompt.
CHATGLM3 = """\
{{- '[gMASK]sop' }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- '\\n ' + message['content'] }}
{%- endgeneration %}
    {%- else %}
        {{- '\\n ' + message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

# The same with tools. A call's name stands right behind a header; a header within a message is the model's to write.
GLM4 = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}
    {{- '<|system|>\\n# Tools' }}
    {%- for tool in tools %}
        {{- '\\n\\n## ' + tool.function.name + '\\n\\n' + tool.function | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '<|system|>\\n' + message['content'] }}
    {%- elif message['role'] == 'user' %}
        {{- '<|user|>\\n' + message['content'] }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|observation|>\\n' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
{%- generation %}
        {%- if message.content is defined %}
            {{- '\\n' + message['content'] }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '' if loop.first and message.content is not defined else '<|assistant|>' }}
            {{- call.function.name + '\\n' + call.function.arguments | tojson }}
        {%- endfor %}
{%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

# The end token is written in front of the next turn: it is the next turn's, so no end token is a target.
END_IN_FRONT = """\
{%- for message in messages %}
    {{- '' if loop.first else '<|im_end|>\\n' }}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- message['content'] }}
{%- endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_end|>\\n<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Tags of its own: both TEMPLATES and TAGGED have this as it is. Calls as in Hermes.
GENERATION = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration -%}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Plain text for headers: no special token stands between a header and its text.
VICUNA = """\
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'].strip() + ' ' }}
    {%- set turns = messages[1:] %}
{%- else %}
    {{- 'A chat of a user and an assistant. ' }}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {{- 'USER: ' + message['content'].strip() + ' ' }}
    {%- elif message['role'] == 'assistant' %}
        {{- 'ASSISTANT:' }}
{%- generation %}
        {{- ' ' + message['content'].strip() + eos_token }}
{%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""

# Behind the last turn, where no answer is asked for, the template closes the text with the end token: nobody's turn.
PHI3 = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- message['content'] + '<|end|>' }}
{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- else %}
    {{- eos_token }}
{%- endif %}
"""

# gpt-oss's way: what was thought is a message of its own, kept in the last turn only, and the last turn ends with
# another token than those before it.
HARMONY = """\
{{- '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|start|>assistant' }}
{%- generation %}
        {%- if message.reasoning_content is defined and loop.last %}
            {{- '<|channel|>analysis<|message|>' + message.reasoning_content + '<|end|><|start|>assistant' }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- set call = message.tool_calls[0].function %}
            {{- ' to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
            {{- call.arguments | tojson + '<|call|>' }}
        {%- else %}
            {{- '<|channel|>final<|message|>' + message.content }}
            {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
        {%- endif %}
{%- endgeneration %}
    {%- else %}
        {{- '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant' }}
{%- endif %}
"""

# ---------------------------------------------------------------- templates that nobody should write, and some do

# Only the last three messages are written.
WINDOW = """\
{%- for message in messages[-3:] %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The number of messages stands in front, and each is numbered from the end.
COUNTED = """\
{{- messages | length | string + ' messages\\n' }}
{%- for message in messages %}
    {{- '<|im_start|>' + loop.revindex | string + ' ' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>0 assistant\\n' }}
{%- endif %}
"""

# What was said is changed.
UPPER = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- message['content'] | upper | replace('A', 'AA') + '<|im_end|>' }}
{%- endgeneration %}
    {%- else %}
        {{- message['content'] | upper + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# All that was said stands in front, once more.
TWICE = """\
{{- 'In short: ' + messages | map(attribute='content') | join(' ') + '\\n' }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Messages of one role in a row are one turn.
MERGED = """\
{%- for message in messages %}
    {%- set goes_on = not loop.first and messages[loop.index0 - 1]['role'] == message['role'] %}
    {%- set ends = loop.last or messages[loop.index0 + 1]['role'] != message['role'] %}
    {{- '' if goes_on else '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- ('\\n\\n' if goes_on else '') + message['content'] + ('<|im_end|>' if ends else '') }}
{%- endgeneration %}
    {%- else %}
        {{- ('\\n\\n' if goes_on else '') + message['content'] + ('<|im_end|>' if ends else '') }}
    {%- endif %}
    {{- '\\n' if ends else '' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# An answer without words is not written at all.
SKIPS_EMPTY = """\
{%- for message in messages if message['content'] | trim %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
{%- generation %}
        {{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_TAG_LINE = re.compile(r"^\{%- (?:end)?generation %\}\n", re.MULTILINE)

TAGGED: dict[str, str] = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "chatml": CHATML,
    "qwen3": QWEN3,
    "r1": R1,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "chatglm3": CHATGLM3,
    "glm4": GLM4,
    "end_in_front": END_IN_FRONT,
    "generation": GENERATION,
    "vicuna": VICUNA,
    "phi3": PHI3,
    "harmony": HARMONY,
}
ODD_TAGGED: dict[str, str] = {
    "window": WINDOW,
    "counted": COUNTED,
    "upper": UPPER,
    "twice": TWICE,
    "merged": MERGED,
    "skips_empty": SKIPS_EMPTY,
}


def without_tags(tagged: str) -> str:
    """The template of a twin."""
    return _TAG_LINE.sub("", tagged)


TEMPLATES: dict[str, str] = {name: without_tags(source) for name, source in TAGGED.items()}
