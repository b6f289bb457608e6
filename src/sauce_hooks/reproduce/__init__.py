"""The paper's tables and figures, each by one command, and whether what the paper claims of them holds here."""
