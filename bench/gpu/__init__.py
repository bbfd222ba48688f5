"""What can be measured on an NVIDIA GPU, most important first: `bash bench/gpu.sh OUTDIR`, or one stage by itself with
`python -m bench.gpu STAGE --out OUTDIR`. Without a GPU it is a rehearsal: tiny sizes, interpreted kernels, host clock.
"""
