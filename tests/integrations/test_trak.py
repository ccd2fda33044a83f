"""DropoutProjector in TRAK's own TRAKer, against TRAK's formulas in float64 (arXiv 2303.14186)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dropinf import DropoutProjector

trak = pytest.importorskip("trak", reason="pip install 'dropinf[trak]'")

N, M, R = 60, 7, 12


def model_of(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def margins(model, x, label):
    """log(p / (1 - p)) of the correct class, TRAK's model output, and 1 - p."""
    log_p = F.log_softmax(model(x), -1)[torch.arange(len(x)), label]
    return log_p - torch.log1p(-log_p.exp()), 1 - log_p.exp()


def gradients(model, x, label):
    """[n, D] of the margins, one example at a time."""
    rows = []
    for b in range(len(x)):
        margin, _ = margins(model, x[b : b + 1], label[b : b + 1])
        grads = torch.autograd.grad(margin.sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("proj_type", ["dropout", "sketch"])
def test_traker(tmp_path, proj_type):
    """One argument changes; the scores are TRAK's of two checkpoints, each with its own mask."""
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(N + M, 3, 4, generator=generator), torch.arange(N + M) % 3
    models = [model_of(0), model_of(1)]
    D = sum(p.numel() for p in models[0].parameters())
    projector = DropoutProjector(D, R, seed=4, proj_type=proj_type)
    traker = trak.TRAKer(
        model=model_of(2),  # TRAKer loads every checkpoint into it
        task="image_classification",
        train_set_size=N,
        projector=projector,  # instead of proj_dim=R
        save_dir=str(tmp_path),
        device="cpu",
        use_half_precision=False,
        logging_level=40,
    )
    for i, model in enumerate(models):
        traker.load_checkpoint(model.state_dict(), model_id=i)
        for part in torch.arange(N).split(25):
            traker.featurize((x[part], label[part]), num_samples=len(part))
    traker.finalize_features()
    for i, model in enumerate(models):
        traker.start_scoring_checkpoint("queries", model.state_dict(), i, num_targets=M)
        traker.score((x[N:], label[N:]), num_samples=M)
    scores = traker.finalize_scores("queries")  # [N, M]

    truth = np.zeros((N, M))
    weights = np.zeros((N, 1))
    for i, model in enumerate(model.double() for model in models):
        matrix = DropoutProjector(D, R, seed=4, proj_type=proj_type, dtype=torch.float64)
        rows = gradients(model, x.double(), label)
        features = (rows @ matrix.project(torch.eye(D).double(), i)).numpy() / np.sqrt(D)
        train, queries = features[:N], features[N:]
        inverse = np.linalg.inv(train.T @ train)
        inverse /= np.abs(inverse).mean()  # TRAK does, for half precision
        truth += train @ inverse @ queries.T / len(models)
        weights += margins(model, x[:N].double(), label[:N])[1].detach().numpy()[:, None] / 2
    truth *= weights
    np.testing.assert_allclose(scores, truth, rtol=0, atol=2e-3 * np.abs(truth).max())
    assert np.abs(truth).max() > 1e-3


def test_interface():
    """Whatever TRAK's abstract projector promises is there."""
    promised = trak.projectors.AbstractProjector
    wanted = [name for name in promised.__abstractmethods__ if name != "__init__"]
    assert wanted and all(callable(getattr(DropoutProjector, name)) for name in wanted)
