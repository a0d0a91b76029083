#!/usr/bin/env bash
# Real sizes with random weights: upcycle an XL-shaped dense model, sample the 16.5B G/2-16E2A from
# 33 GB on disk by int8 and by streaming. Prints peak memory; needs 45 GB of disk and 20 GB of RAM.
EXTRAS="dev" source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

folder=${1:-/tmp/real-sizes}
trap 'rm -rf "$folder"' EXIT

measured() { # run a command, then print the peak resident memory of its process
  python -c 'import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print("peak memory %.2f GB" % (resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1.024e-6))' "$@"
}

write() { # write a model of a registered size: NAME SIZE DTYPE FIELDS
  measured python - "$folder/$1" "$2" "$3" "$4" <<'PYTHON'
import json, sys
import torch
from checkpoint.hub import save_folder
from models import DiT_models

folder, size, dtype, fields = sys.argv[1:]
with torch.device("meta"):
    model = DiT_models[size](**json.loads(fields))
shapes = {name: p.shape for name, p in model.state_dict().items()}
rand = lambda shape: (0.02 * torch.randn(shape)).to(getattr(torch, dtype))
block = {n[9:]: rand(s) for n, s in shapes.items() if n.startswith("blocks.0.")}
outside = {n: rand(s) for n, s in shapes.items() if not n.startswith("blocks.")}
blocks = ({f"blocks.{i}.{n}": t.clone() for n, t in block.items()} for i in range(model.config.depth))
save_folder(folder, (g for gs in ([outside], blocks) for g in gs), model.config, {"objective": "rf"})
print(folder, *(f"{count:,}" for count in model.num_parameters()), "parameters, activated")
PYTHON
}

vae() {
  python - "$folder/vae" <<'PYTHON'
import sys
from diffusers import AutoencoderKL

down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=down, up_block_types=up,
              norm_num_groups=8).save_pretrained(sys.argv[1])
PYTHON
}

mkdir -p "$folder" && vae
write xl-dense DiT-XL/2 float32 '{"num_experts": 0}'
measured python upcycle.py --ckpt "$folder/xl-dense" --out "$folder/xl" --num-experts 8 \
  --num-shared-experts 2 --dtype bfloat16
rm -rf "$folder/xl" "$folder/xl-dense"
write g DiT-G/2 bfloat16 '{}'
for how in "--quantize int8" "--offload disk"; do
  # shellcheck disable=SC2086
  measured python sample.py --ckpt "$folder/g" --vae-path "$folder/vae" --dtype bfloat16 $how \
    --num-sampling-steps 2 --labels 207 --num-per-class 1 --out "$folder/one.png"
done
