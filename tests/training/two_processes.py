"""One of two processes of a calibration, for test_trainer.py: two_processes.py RANK FOLDER (tests on the path)."""

import sys
from pathlib import Path

import torch
import torch.distributed
from test_student import pair
from test_trainer import EXAMPLES, trainer

from intactkv_eval.training.distributed import Ranks
from intactkv_eval.training.teacher import layer_outputs

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
full, pivot, quantized, _ = pair("llama", torch.float32)
models = pivot, quantized, [layer_outputs(full, pivot, one) for one in EXAMPLES]
made, rows, state = trainer(models, folder / "two", ranks=Ranks(rank, 2))
state.writes = rank == 0
made.run()
torch.save([parameter.detach() for parameter in rows.parameters()], folder / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
