"""Generation: prompts as training writes them, the choice of the next token, and the loop that both backends share."""
