"""`prepare.py budget`: will decoding starve a training run, and what would help?

    rates       frames, seconds and clips/s, by arithmetic only
    survey      reads the headers of sampled videos, and times decoding and the network on this machine
    report      combines both into one report
    text        the report in words and as a table

dali_pipelines/gpus.py holds published and measured figures of GPUs; dali_pipelines/engines.py decides which videos
NVDEC decodes, and how `auto` shares the clips between NVDEC and the CPU cores.

A decode is one training sample as `plan` decides it: `data.views_per_decode` clips of one video. Frames are counted by
the packets that a decoder is fed.
"""
