"""The card that a rehearsal shows: the memory of an H200, which the catalogue has."""

TOTAL_BYTES = 143156 * 2**20
RESERVED_BYTES, USED_BYTES = 615 * 2**20, 4 * 2**20
