"""Memory that each GPU of several needs beside the traced step. Nothing of it is measured here: bounds with their sources."""

from trainfit.gpus.catalogue import MIB, Gpu
from trainfit.gpus.context import ByteRange

BUCKET_BYTES = 25 * MIB
"""The buffer that gradients travel through, as training exchanges them (a test compares with the room `step`)."""
CONNECTION_BYTES = 12 * MIB
"""NCCL's buffers of one connection, of all three protocols: 10 MiB and 2 MiB, as NCCL_DEBUG_SUBSYS=ALLOC listed them on
H100s (NVIDIA/nccl issue 1685)."""
CONNECTIONS = 2
"""Connections of each channel: rings have two however many ranks there are, and memory is linear in the channels
(NVIDIA/nccl issues 864 and 986)."""
FEWEST_CHANNELS = 2
MOST_CHANNELS = {(7, 0): 32, (8, 0): 32, (9, 0): 32, (10, 0): 32}
"""Cards with NVLink between all of a machine: 32 on 8 H100s (issue 1685)."""
MOST_CHANNELS_OTHERWISE = 8
"""Assumed for cards on PCIe or on a bridge of two; no measurement was at hand."""


def nccl_bytes(gpu: Gpu) -> ByteRange:
    """NCCL's communicator on one GPU, its smallest and its largest size; a card of unknown capability gets the largest."""
    most = 32 if gpu.capability is None else MOST_CHANNELS.get(gpu.capability, MOST_CHANNELS_OTHERWISE)
    channel_bytes = CONNECTIONS * CONNECTION_BYTES
    return ByteRange(low_bytes=FEWEST_CHANNELS * channel_bytes, high_bytes=most * channel_bytes)


def exchange_bytes() -> ByteRange:
    """The buffer of the gradient exchange; where all gradients are fewer bytes, as many as they are, which is not modelled."""
    return ByteRange(low_bytes=BUCKET_BYTES, high_bytes=BUCKET_BYTES + MIB)  # the allocator takes whole 2 MiB
