"""Prints the accuracy of k nearest neighbors on frozen features, which no classifier has to learn.

    python docs/knn.py --dataset shapes --epochs 0 --checkpoint out-shapes/encoder.pth

The flags are those of train_cifar.py. As in DINO (Caron et al., 2021), the 20 training images with
the largest cosine similarity vote for their class, each with exp(similarity / 0.07).
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_cifar as script

def knn(x: Tensor, y: Tensor, x_test: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Votes (n_test, classes) for features x (n, D) with labels y (n,) and x_test (n_test, D)."""
    x, votes = F.normalize(x), []
    one_hot = F.one_hot(y).float()                       # (n, classes)
    for part in F.normalize(x_test).split(1000):
        similarity, nearest = (part @ x.T).topk(min(k, len(x)), dim=1)       # (1000, k)
        vote = (similarity / temperature).exp()
        votes.append((vote[:, :, None] * one_hot[nearest]).sum(dim=1))
    return torch.cat(votes)

if __name__ == "__main__":
    args = script.parse_args(None)
    if not args.checkpoint:
        sys.exit("error: --checkpoint must name an encoder, or none for a new one")
    encoder = script.load_encoder(args)
    train, test = script.load_data(args)
    x = script.features(args, train, encoder)            # (n, 2, D)
    x_test = script.features(args, test, encoder)
    for i, readout in enumerate(["[CLS]", "mean of the patches"]):
        votes = knn(x[:, i], train.labels, x_test[:, i])
        print(f"20 nearest neighbors on {readout}: {script.accuracy(votes, test)} %")
