"""In a notebook: an interactive session whose classes live in ``__main__``, and whose cells are run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CELLS = '''
import sys, warnings; warnings.simplefilter("ignore")
import lightning.pytorch as pl, torch, lightning_peft as lp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

exec("""class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    def training_step(self, batch, _):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)""")

net, data = Net(), DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4)

def cell(rank): trainer = pl.Trainer(max_epochs=1, callbacks=[lp.PEFTCallback(lp.LoRA(rank=rank, targets="all-linear"))], accelerator="cpu", logger=False); trainer.fit(net, data); return trainer

first = cell(2)
value = lp.handles(net)["default"].state_dict()["0.lora_B"].clone()
second = cell(2)
print("INTERACTIVE", hasattr(sys, "ps1"))
print("TRAINED ON", not torch.equal(value, lp.handles(net)["default"].state_dict()["0.lora_B"]))
same = lp.load_from_checkpoint(Net, second.checkpoint_callback.best_model_path)
print("LOADED", torch.equal(same.net(torch.ones(1, 4)), net.net(torch.ones(1, 4))))
cell(1)
lp.handles(net)["default"].remove()
print("AGAIN", lp.handles(cell(1).lightning_module)["default"].strategy.rank)
'''


def test_cells_run_again_in_an_interactive_session(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-i"], input=CELLS, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300
    )
    for line in ("INTERACTIVE True", "TRAINED ON True", "LOADED True", "AGAIN 1"):
        assert line in done.stdout, done.stderr[-3000:]
    # The cell with another rank met the adapter of the cells before; it said so, and the session went on.
    assert "ConflictError" in done.stderr
