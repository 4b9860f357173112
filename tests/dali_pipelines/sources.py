"""A source that meets what no file here can be relied on to do to a decoder."""

import os
import re
import signal

from dali_pipelines.clip_source import ClipSource

HANGS, CRASHES = 4, 9  # sample ids


class TroubledSource(ClipSource):
    def _read(self, epoch, sample_id, part):
        if sample_id == HANGS:
            re.match(r"(a+)+$", "a" * 60 + "b")  # in C, and never lets another thread run
        if sample_id == CRASHES:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super()._read(epoch, sample_id, part)


class DyingSource(ClipSource):
    def sample(self, place):
        os.kill(os.getpid(), signal.SIGKILL)
