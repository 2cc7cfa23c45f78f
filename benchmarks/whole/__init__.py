"""What benchmarks.gpu_whole does on a GPU, part by part."""
