"""A description of Mixtral that is wrong: the weights of a token's experts do add up to 1."""

from dataclasses import replace

from examples.model_family.mixtral import MIXTRAL

NOT_NORMALIZED = replace(MIXTRAL, defaults={"norm_topk_prob": False})
