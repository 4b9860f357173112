"""`prepare.py budget`: estimates whether decoding keeps up with a training run, and what would help.

    rates       computes frames, seconds and clips/s, without reading files
    survey      reads the headers of sampled videos, and times decoding and the network on this machine
    report      combines both into one report
    text        formats the report as text
    cost        hours, GPU memory and disk of the whole run

dali_pipelines/gpus.py holds published and measured figures of GPUs; dali_pipelines/engines.py decides which videos
NVDEC decodes, and how `auto` shares the clips between NVDEC and the CPU cores.

A decode is one training sample as `plan` makes it: `data.views_per_decode` clips of one video. Frames are counted as
packets fed to the decoder.
"""
