"""A loop of your own that survives out-of-memory errors: here the model has room for three images, and says so as CUDA does."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import trainfit

ROOM = 3


class Crowded(nn.Module):
    """Runs out of memory with more images than there is room for."""

    def __init__(self):
        super().__init__()
        self.room = ROOM
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.body(images)


def loss(model, batch):
    images, labels = batch
    return cross_entropy(model(images), labels)


def train(room):
    torch.manual_seed(0)
    model = Crowded()
    model.room = room
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = trainfit.survive_oom(loss, model=model, optimizer=optimizer, micro_batch=8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        images = torch.randn(8, 3, 4, 4, generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        step((images, labels))  # forward, backward, step and zero_grad for the whole batch
    return model, step


if __name__ == "__main__":
    crowded, step = train(ROOM)
    roomy, _ = train(8)
    pairs = zip(crowded.parameters(), roomy.parameters(), strict=True)
    print(f"micro-batch {step.micro_batch} after {len(step.survived)} errors")
    print(f"parameters differ by {max(float((a - b).detach().abs().max()) for a, b in pairs):.1e}")
