"""A source that meets what no file here can be relied on to do to a decoder."""

import os
import re
import resource
import signal

from dali_pipelines.clip_source import ClipSource

HANGS, CRASHES, HUNGRY = 4, 9, 1  # sample ids


class TroubledSource(ClipSource):
    def _read(self, epoch, sample_id, part):
        if sample_id == HANGS:
            re.match(r"(a+)+$", "a" * 60 + "b")  # in C, and never lets another thread run
        if sample_id == CRASHES:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super()._read(epoch, sample_id, part)


class HungrySource(ClipSource):
    """May take a little more memory than it has, for one sample."""

    def _read(self, epoch, sample_id, part):
        limits = resource.getrlimit(resource.RLIMIT_AS)
        if sample_id == HUNGRY:
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20), limits[1]))
        try:
            return super()._read(epoch, sample_id, part)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)


class DyingSource(ClipSource):
    def sample(self, place):
        os.kill(os.getpid(), signal.SIGKILL)
