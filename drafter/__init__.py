"""The drafter of speculative decoding and its training; empty in this release."""
