"""What an out-of-memory message and a log's memory figures mean, from Python."""

import trainfit
from trainfit.reports.explain import explain_text

MESSAGE = (
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of "
    "23.65 GiB of which 1.66 GiB is free. Including non-PyTorch memory, this process has 20.81 GiB memory in use. "
    "Of the allocated memory 12.09 GiB is allocated by PyTorch, and 4.84 GiB is reserved by PyTorch but unallocated."
)
LOG = "\n".join(f"iter: {step}  total_loss: 0.71  max_mem: {4000 + 12 * step}M" for step in range(50))

if __name__ == "__main__":
    for text in (MESSAGE, LOG):
        print(explain_text(trainfit.explain(text)), end="\n\n")
