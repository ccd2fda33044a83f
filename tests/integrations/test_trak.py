"""DropoutProjector in TRAK's own TRAKer, against TRAK's formulas in float64 (arXiv 2303.14186)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropinf
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


def energies_of(model, x, label):
    """By TRAK's model output."""
    return dropinf.energies(model, [(x, label)], lambda model, batch: margins(model, *batch)[0])


@pytest.mark.parametrize("by", ["uniform", "energies", "a tensor"])
@pytest.mark.parametrize("proj_type", ["dropout", "sketch"])
def test_traker(tmp_path, proj_type, by):
    """One argument changes; the scores are TRAK's of two checkpoints, each with its own mask."""
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(N + M, 3, 4, generator=generator), torch.arange(N + M) % 3
    models = [model_of(0), model_of(1)]
    D = sum(p.numel() for p in models[0].parameters())
    options = {"seed": 4, "proj_type": proj_type}
    if by == "energies":
        options["energies"] = energies_of(models[0], x[:N], label[:N])
    elif by == "a tensor":
        options["energies"] = gradients(models[0], x[:20], label[:20]).square().mean(0)
    projector = DropoutProjector(D, R, **options)
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
        matrix = DropoutProjector(D, R, dtype=torch.float64, **options)
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


def own_scores(tmp_path, model, x, label, projector):
    """[N, M] of one checkpoint."""
    traker = trak.TRAKer(
        model,
        "image_classification",
        train_set_size=N,
        projector=projector,
        save_dir=str(tmp_path),
        device="cpu",
        use_half_precision=False,
        lambda_reg=1e-2,
        logging_level=50,
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize((x[:N], label[:N]), num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("queries", model.state_dict(), 0, num_targets=M)
    traker.score((x[N:], label[N:]), num_samples=M)
    return torch.from_numpy(np.array(traker.finalize_scores("queries"))).flatten().double()


@pytest.mark.parametrize("proj_type", ["dropout", "sketch"])
def test_energies(tmp_path, proj_type):
    """Of 16 entries, scores agree more with those of all 963 coordinates than of uniform ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 3)).eval()
    x = torch.randn(N + M, 6, 6) * torch.exp(1.5 * torch.randn(6, 6))
    label = torch.arange(N + M) % 3
    energies = energies_of(model, x[:N], label[:N])

    def scores(r, name, **options):
        projector = DropoutProjector(963, r, **options)
        return own_scores(tmp_path / name, model, x, label, projector)

    exact, mean = scores(963, "exact"), {}
    for by in (None, energies):
        found = [
            scores(16, f"{by} {seed}", seed=seed, energies=by, proj_type=proj_type)
            for seed in range(8)
        ]
        mean[by] = float(torch.corrcoef(torch.stack([exact, *found]))[0, 1:].mean())
    assert mean[energies] > mean[None] + 0.1


def test_a_folder_of_other_energies_is_refused(tmp_path):
    """By TRAK, which compares the projector's type."""
    x, label = torch.randn(N + M, 3, 4), torch.arange(N + M) % 3
    model = model_of(0)
    given = torch.rand(131)
    own_scores(tmp_path, model, x, label, DropoutProjector(131, R, energies=given))
    own_scores(tmp_path, model, x, label, DropoutProjector(131, R, energies=given))
    for other in (None, torch.rand(131)):
        with pytest.raises(AssertionError, match="there are models using a dropout by energy"):
            own_scores(tmp_path, model, x, label, DropoutProjector(131, R, energies=other))


def test_interface():
    """Whatever TRAK's abstract projector promises is there."""
    promised = trak.projectors.AbstractProjector
    wanted = [name for name in promised.__abstractmethods__ if name != "__init__"]
    assert wanted and all(callable(getattr(DropoutProjector, name)) for name in wanted)
