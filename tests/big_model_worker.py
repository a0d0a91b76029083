"""Build a model of over a billion parameters under ZeRO-3, make one step, say how much it took.

    torchrun --nproc_per_node=2 tests/big_model_worker.py FOLDER

Both ranks share one machine's memory, about 18 GiB of it. So FOLDER gets an engine file, which is
config/zero3.json with small buckets, and the EMA, mapped.
"""

import json
import os
import resource
import sys
from itertools import islice
from pathlib import Path

import torch
from launch import REPO

from train_deepspeed import build_deepspeed_parser
from training import zero
from training.job import prepare
from training.loop import latent_batches
from training.zero_trainer import DeepSpeedTrainer


def peak() -> float:
    """Return the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(folder: Path) -> None:
    """Build, step and write `FOLDER/RANK.json`."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # rather this than anybody else
    config = json.loads((REPO / "config/zero3.json").read_text())
    small = [
        *("reduce_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
    ]
    config["zero_optimization"] |= dict.fromkeys(small, 20_000_000)
    engine_file = folder / f"engine.{os.environ['RANK']}.json"  # each rank its own: no torn reads
    engine_file.write_text(json.dumps(config))
    flags = [
        *("--data-path", "digits", "--model", "DiT-B/2", "--rf", "--grad-checkpointing"),
        *("--num-experts", "10", "--mlp-ratio", "4.1875", "--global-batch-size", "2"),
        *("--deepspeed-config", str(engine_file), "--precision", "bf16"),
    ]
    rt = zero.join()
    start = peak()
    trainer = DeepSpeedTrainer(prepare(build_deepspeed_parser().parse_args(flags), meta=True))
    built = peak()
    for i, shard in enumerate(trainer.ema):
        path = str(folder / f"ema_{rt.rank}_{i}")
        trainer.ema[i] = torch.from_file(path, shared=True, size=len(shard)).copy_(shard)
    values = trainer.train_step(islice(latent_batches(trainer.job, 0), 1))
    figures = {
        "parameters": trainer.job.num_parameters[0],
        "start": start,
        "built": built,
        "stepped": peak(),
        **{name: float(value) for name, value in values.items()},
    }
    (folder / f"{rt.rank}.json").write_text(json.dumps(figures))
    print(figures)
    zero.process.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
