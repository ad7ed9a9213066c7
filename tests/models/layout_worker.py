"""Runs a tiny model under one parallel layout and saves what this rank computed.

layout_worker MODEL PP CP EP RECOMPUTE OUTPUT [FAMILY]
"""

import sys
from pathlib import Path

import torch

from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weights import export_hf
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.trainer import Trainer
from tests.hf_models import VOCAB, random_sequences
from tests.models.parity_worker import TEMPERATURE, gradients, make_config


def main() -> None:
    model, pp, cp, ep, recompute, output, *named = sys.argv[1:]
    family = named[0] if named else None
    config = make_config(Path(model), 1, int(pp), int(cp), int(ep), family, recompute=recompute)
    runtime = initialize(config)
    trainer = Trainer(config, runtime, Architecture.from_folder(model, family), VOCAB, TEMPERATURE)
    # An odd number: replicas get different numbers of sequences.
    batch = Batch(*random_sequences(13))
    export_hf(trainer.weights, model, Path(output) / "hf")
    result = {
        "logprobs": trainer.logprobs(batch),
        "pieces": [(name, index, value.clone()) for name, index, value in trainer.weights.pieces()],
        "names": [meta.name for meta in trainer.weights.metadata()],
        "order": [name for name, _ in trainer.weights],
        "gradients": gradients(trainer, batch),
        "metrics": trainer.imitate(batch),
    }
    torch.save(result, Path(output) / f"rank{runtime.rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
