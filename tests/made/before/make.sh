#!/usr/bin/env bash
# Makes the files in this folder with the code of the commit in COMMIT: `tests/made/before/make.sh LATENTMILL [FOLDER]`.
# It uses only the command line, and stores no time, host or path of the machine. The arithmetic is restricted to
# instructions that every x86-64 processor has, so that the bits depend only on the versions in constraints.txt.
set -euo pipefail
mill=$(realpath "$1")
cd "${2:-$(dirname "$0")}"
export OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE WANDB_MODE=offline
rm -rf shapes shapes-val cache cache-val run later report.html samples.png export model.safetensors SHA256SUMS

"$mill" synth dest=shapes images=24 seed=5
"$mill" synth dest=shapes-val images=8 seed=6 split=val
for name in '' -val; do
    "$mill" encode source="shapes$name/00000.tar" dest="cache$name" encoders=demo launch.threads=1 text_storage=trimmed
done
# The smallest UNet with every kind of layer, four kilobytes each, on two ranks in ZeRO 2.
train='data.train=cache data.val=cache-val model=tiny model.channels=4 model.multipliers=[1,1] model.blocks=1
       model.attention=[2] model.heads=2 model.norm_groups=2 diffusion=v optim.batch=8 optim.warmup=16 optim.lr=1e-3
       deepspeed=zero2 launch.processes=2 precision=fp32 checkpoint.every=16 ema.half_life=32 eval.images=8
       eval.grid=4 eval.loss_images=8 eval.sampler.steps=2 eval.sampler.batch=8 tracking.wandb=off tracking.every=8'
"$mill" train run=run samples=32 $train
cp -r run later
"$mill" train run=later samples=64 $train
"$mill" sample run=run 'prompt=a large red circle' n=2 sampler.steps=4 dest=samples.png seed=3
"$mill" report run dest=report.html
"$mill" export run=run dest=export format=diffusers
"$mill" export run=run dest=model.safetensors format=compvis

# Hashes of the results of resume, sampler and exports. Safetensors writes the metadata in its header in any order, so of
# the one file with several entries only the tensors are hashed; the names of a commit's files end in a random word.
{
    sha256sum samples.png export/*/*.safetensors
    tail -c 8000000 model.safetensors | sha256sum | sed 's/-/model.safetensors/'
    (cd later/checkpoints && sha256sum 000000000064/*.safetensors) | sed -E 's/-[0-9a-f]{8}\.safetensors/.safetensors/'
} > SHA256SUMS
rm -rf shapes/*.json shapes-val/*.json run/lease later model.safetensors export/{vae,text_encoder,tokenizer}
