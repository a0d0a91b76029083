#!/usr/bin/env bash
# Training from a latent cache against training from images: loss curves on 2,000 Fashion-MNIST
# pictures, enlarged to JPEGs of 500 pixels, and how fast batches come. VAEs have random weights, one
# tiny and one of Stable Diffusion's size. The page is docs/RESULTS.md:
#   bash scripts/experiments/cache.sh
# About 12 minutes on two CPU cores; runs that are done stay.
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"

out=${OUT:-results/cache}
[ -e "$out/images" ] || python - "$out" <<'PYTHON'
import os, sys
from pathlib import Path
from diffusers import AutoencoderKL
from PIL import Image
from data import load_dataset

out, data = Path(sys.argv[1]), load_dataset("fashion-mnist")
images, labels = data.__getitems__([(index, False) for index in range(2000)])
for index, (image, label) in enumerate(zip(images, labels)):
    path = out / "images.part" / f"{label:02d}" / f"{index:04d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    gray = Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy())
    gray.convert("RGB").resize((500, 500), Image.Resampling.BICUBIC).save(path)
down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
sizes = {"vae-tiny": ((8,) * 4, 1, 8), "vae-sd": ((128, 256, 512, 512), 2, 32)}
for name, (channels, layers, groups) in sizes.items():
    AutoencoderKL(block_out_channels=channels, down_block_types=down, up_block_types=up,
                  layers_per_block=layers, norm_num_groups=groups).save_pretrained(out / name)
os.rename(out / "images.part", out / "images")
PYTHON

for dtype in float32 float16; do
  python encode_latents.py --data-path "$out/images" --vae-path "$out/vae-tiny" --image-size 64 \
    --dtype $dtype --out "$out/latents-$dtype" --num-workers 2
done
train() { # run name, data, flags...
  python train.py --results-dir "$out" --run-name "$1" --data-path "$2" "${@:3}" --rf \
    --model DiT-Ti/2 --image-size 64 --max-steps 200 --global-batch-size 32 --lr 1e-3 \
    --precision fp32 --log-every 10 --sample-every 0 --num-workers 2 >"$out/$1.log" 2>&1
}
train from-images "$out/images" --vae-path "$out/vae-tiny"
train from-float32 "$out/latents-float32"
train from-float16 "$out/latents-float16"
python scripts/experiments/collect.py cache --results "$out"

python encode_latents.py --data-path "$out/images" --vae-path "$out/vae-tiny" --image-size 256 \
  --out "$out/latents-256" --num-workers 2
python scripts/experiments/loader.py --data-path "$out/images" "$out/latents-256" \
  --vae-path "$out/vae-sd" --batch-size 8 --num-batches 2
