"""Lightning: a run goes on from its checkpoint, whatever the phase."""

from __future__ import annotations

import warnings

import amtl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="needs: pip install lightning")

ROWS = 60


class Module(lightning.LightningModule):
    def __init__(self, parametrization, freeze_at):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(ROWS, 8), nn.Linear(8, 1))
        self.freeze_at = freeze_at
        options = {"parametrization": parametrization, "size_noise": 0.0}
        amtl.convert(self.net, {"0": torch.arange(ROWS)}, **options)

    def training_step(self, batch, number):
        if self.global_step == self.freeze_at:
            amtl.freeze(self.net)
        rows, target = batch
        return (self.net(rows).squeeze(1) - target).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(amtl.parameter_groups(self.net, lr=1e-2), lr=0.05)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        }


def fit(module, folder, epochs, **options):
    data = TensorDataset(torch.arange(2 * ROWS) % ROWS, torch.arange(2 * ROWS).float().sin())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", **quiet
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, batch_size=40), **options)
    return trainer


@pytest.mark.parametrize("parametrization", ["rule", "ordinal"])
@pytest.mark.parametrize("freeze_at", [2, 4, 100])
def test_a_run_goes_on_from_its_checkpoint(parametrization, freeze_at, tmp_path):
    """Frozen before the checkpoint, after it, or never."""
    module = Module(parametrization, freeze_at)
    trainer = fit(module, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    whole = Module(parametrization, freeze_at)
    fit(whole, tmp_path, 2)
    resumed = Module(parametrization, freeze_at)
    fit(resumed, tmp_path, 2, ckpt_path=str(tmp_path / "run.ckpt"))
    expected = whole.state_dict()
    assert resumed.net[0].phase == whole.net[0].phase
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())
