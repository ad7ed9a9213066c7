"""Gradients of the routers' losses alone, under HF names: routing_worker MODEL AUX Z BUDGET RECOMPUTE OUTPUT."""

import sys
from pathlib import Path

import torch

from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.trainer import Trainer
from tests.hf_models import VOCAB, random_sequences
from tests.models.parity_worker import TEMPERATURE, make_config

SEQUENCES = 6


def main() -> None:
    model, aux, z, budget, recompute, output = sys.argv[1:]
    options = {"router_aux_loss": float(aux), "router_z_loss": float(z), "recompute": recompute}
    config = make_config(Path(model), 1, 1, **options)
    runtime = initialize(config)
    trainer = Trainer(config, runtime, Architecture.from_folder(model), VOCAB, TEMPERATURE)
    single = config.train.model_copy(update={"tokens_per_microbatch": int(budget)})
    trainer.config = config.model_copy(update={"train": single})
    batch = Batch(*random_sequences(SEQUENCES))

    def nothing(microbatch, logprobs, entropies):
        return 0 * logprobs.sum(), {}

    tokens = sum(batch.sequence_length(index) for index in range(SEQUENCES))
    for _ in range(2):  # a second step must not add to the first
        trainer.ddp.train()
        trainer.ddp.zero_grad_buffer()
        trainer.routing.start(tokens)
        trainer._run(batch, nothing, forward_only=False, progress=None)
    weights = trainer.weights
    weights.live = {name: parameter.main_grad for name, parameter in trainer.model.named_parameters()}
    gradients = {name: value.clone() for name, _, value in weights.pieces() if ".mlp.gate." in name}
    counts = trainer.routing._counts.clone()
    torch.save({"gradients": gradients, "counts": counts}, Path(output) / f"rank{runtime.rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
