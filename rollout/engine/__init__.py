"""One vLLM engine, and what is changed in vLLM."""
