"""One vLLM engine, and the functions of vLLM that are replaced."""
