"""What a GPU finds, in a few minutes: tests, losses beside a CPU's, a slice of DeepSeek-V3 beside its plan and beside
`transformers`. `python -m benchmarks.gpu_check`; docs/gpu_check.md. Not yet run on a GPU."""
