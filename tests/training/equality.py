"""For test_equality.py: trains some steps in so many micro-steps, in the processes that torchrun starts.

    equality.py MICRO_STEPS,... CONFIG ...

The main process writes <config>.<processes>x<micro_steps>.pt: losses, the gradients of the first step, the weights
after the last, how often gradients were reduced over processes in each micro-step, and all sample ids.
"""

import itertools
import sys
from collections import Counter

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from common.config import load_config
from common.distributed import start_process
from training.engine import Trainer


class Watched(Trainer):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.gradients, self.losses, self.ids = None, [], []
        self.reduced, self.micro_step = Counter(), 0
        if self.process.world_size > 1:
            self.model.register_comm_hook(None, self.reduce)

    def reduce(self, state, bucket):
        self.reduced[self.micro_step] += 1
        return allreduce_hook(state, bucket)

    def forward_backward(self, batch, micro_step, *, is_last):
        self.micro_step = micro_step
        self.ids.append((self.step, micro_step, batch.sample_ids.tolist()))
        return super().forward_backward(batch, micro_step, is_last=is_last)

    def _commit_step(self, gradients, factor, result):
        if self.gradients is None:
            self.gradients = [gradient * factor for gradient in gradients]
        self.losses.append(result.loss)
        super()._commit_step(gradients, factor, result)


def main():
    torch.set_num_threads(1)
    counts, *config_files = sys.argv[1:]
    with start_process("cpu") as process:
        for config_file, micro_steps in itertools.product(config_files, map(int, counts.split(","))):
            config = load_config(config_file)
            config.data.batch_size = config.optim.global_batch_size // process.world_size // micro_steps
            name = f"{config_file}.{process.world_size}x{micro_steps}"
            config.output = f"{name}.output"
            trainer = Watched(config, process, resume=False)
            trainer.train()
            ids = process.gather(trainer.ids)
            if process.is_main:
                result = {
                    "losses": trainer.losses,
                    "gradients": trainer.gradients,
                    "weights": dict(trainer.network.state_dict()),
                    "reduced": dict(trainer.reduced),
                    "ids": ids,
                }
                torch.save(result, f"{name}.pt")


if __name__ == "__main__":
    main()
