"""The attention types of a TimeSformer. A new one is a class here, and an entry in `ATTENTION_TYPES`.

They share blocks and parameters, and differ in which patches attend to each other: attention runs over the patches of
a frame, so a type defines how clips are arranged as frames. Shapes: B clips, T frames, N patches per frame, D channels.
"""

import torch
from torch import Tensor


class AttentionType:
    """Base class, which leaves clips as they are."""

    over_time = False
    """Whether blocks have attention over time before attention over space."""
    has_time_embedding = True

    def arrange(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens [B, 1, 1, D] and patches [B, N, T, D] -> the same for the blocks."""
        return cls, x

    def pool(self, cls: Tensor, batch: int) -> Tensor:
        """The class tokens of the blocks -> [B, 1, 1, D]."""
        return cls

    def most_attended(self, num_frames: int, num_patches: int) -> int:
        """The largest number of patches that attend to each other."""
        return max(num_frames if self.over_time else 1, num_patches)

    def restore(self, cls: Tensor, patches: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """Undoes `arrange` for the shares of attention rollout: class tokens [b] and patches [b, t, n] -> [B] and
        [B, T, N]."""
        return cls, patches


class DividedSpaceTime(AttentionType):
    """Each patch attends over time at its position, then within its frame (section 3.3; the published weights)."""

    over_time = True


class JointSpaceTime(AttentionType):
    """All patches of a clip attend to each other: a clip is one frame of N*T patches."""

    def arrange(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """A clip becomes one frame."""
        return cls, x.flatten(1, 2).unsqueeze(2)  # [B, N*T, 1, D]

    def most_attended(self, num_frames: int, num_patches: int) -> int:
        """All patches of the clip."""
        return num_frames * num_patches

    def restore(self, cls: Tensor, patches: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """Undoes `arrange` for attention rollout."""
        return cls, patches.view(len(cls), -1, num_frames).transpose(1, 2)  # from [B, 1, N*T]


class SpaceOnly(AttentionType):
    """Frames are an unordered set: each frame is treated as a clip, and the results are averaged."""

    has_time_embedding = False

    def arrange(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each frame becomes a clip."""
        return cls.repeat_interleave(x.shape[2], dim=0), x.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [B*T, N, 1, D]

    def pool(self, cls: Tensor, batch: int) -> Tensor:
        """The mean over the frames of a clip."""
        return torch.unflatten(cls, 0, (batch, -1)).mean(1)

    def restore(self, cls: Tensor, patches: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """Undoes `arrange` for attention rollout; frames have equal shares."""
        return cls.view(-1, num_frames).mean(1), patches.view(-1, num_frames, patches.shape[2]) / num_frames


ATTENTION_TYPES: dict[str, AttentionType] = {
    "divided_space_time": DividedSpaceTime(),
    "joint_space_time": JointSpaceTime(),
    "space_only": SpaceOnly(),
}
