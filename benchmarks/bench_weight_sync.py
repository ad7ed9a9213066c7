"""Weight sync from the trainer to a running vLLM engine, beside a plain memory copy of the same bytes.

    python benchmarks/bench_weight_sync.py [--quick] [--json FILE]

`sync_vs_memcpy` is the sync's GB/s over the copy's. A sync writes the trainer's shards to shared memory, then the
engine loads them: split into its fused projections and packed for its kernels.
"""

import torch

from _common import finish, measure, parse_arguments
from _model import build

SMALL = {"hidden_size": 384, "layers": 4, "heads": 6, "kv_heads": 2, "head_dim": 64, "ffn_hidden_size": 1536}
LARGE = {"hidden_size": 1024, "layers": 16, "heads": 16, "kv_heads": 8, "head_dim": 64, "ffn_hidden_size": 4096}


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(__doc__)
    bench = build(SMALL if arguments.quick else LARGE, data={"max_prompt_tokens": 32}, rollout={"max_tokens": 32})
    try:
        tensors = bench.trainer.weights.metadata()
        gigabytes = sum(meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in tensors) / 1e9
        origin = torch.zeros(int(gigabytes * 1e9), dtype=torch.uint8)
        target = torch.zeros_like(origin)
        cases = {"sync": lambda: bench.weight_sync.sync(1), "memcpy": lambda: target.copy_(origin)}
        seconds = measure(cases, repetitions=5 if arguments.quick else 15)
        bench.weight_sync.verify()  # a fast sync of wrong weights would be worthless
    finally:
        bench.close()
    rows = [
        {"case": name, "GB": gigabytes, "time [ms]": 1e3 * seconds[name], "GB/s": gigabytes / seconds[name]}
        for name in cases
    ]
    finish(arguments, {"sync_vs_memcpy": seconds["memcpy"] / seconds["sync"]}, rows)


if __name__ == "__main__":
    main()
