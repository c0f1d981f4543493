"""Logits over the ids of a vocabulary as logits over its classes, and a gradient on these back as one on the ids.

In: a partition of both vocabularies; out: for each side a `SideOfClasses`, made once a run, whose passes are a few dense operations.
A class of one id keeps its logit exactly. A larger one has the log-sum-exp of its ids, with its own maximum taken out first: a class
of ids that are all improbable must not underflow. Sums are over gathered ids, never scattered ones: the same numbers on every call.

Axes: C rows of a chunk, V ids of one side, K classes, n classes of a bucket, s ids of each, filled up.
Source: docs/concepts/method.md 8.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from student_trainer.errors import DataError
from student_trainer.losses.cross_tokenizer.kernels import SortedIds

_GROWTH = 1.5  # sizes of classes in one bucket differ by this factor at most: little is filled up, and buckets are few


@dataclass(frozen=True, eq=False)
class Bucket:
    """Classes of more than one id, of about the same size.

    Attributes:
        class_n: int64, which.
        ids_ns: int64, their ids, one class behind another, [n * s]; a class that is filled up repeats its last.
        is_filler_ns: bool [n, s], the repeated ones; None if there are none.
        size: s.
    """

    class_n: Tensor
    ids_ns: Tensor
    is_filler_ns: Tensor | None
    size: int


@dataclass(frozen=True, eq=False)
class SideOfClasses:
    """One vocabulary in its classes, on the device of the losses.

    Attributes:
        class_V: int64, of each id.
        first_K: int64, an id of each class: the only one of a class of one; it stands for its class.
        buckets: of the others.
        size_K: int64, on the host, ids of each class.
    """

    class_V: Tensor
    first_K: Tensor
    buckets: tuple[Bucket, ...]
    size_K: np.ndarray

    @property
    def vocab_rows(self) -> int:
        return self.class_V.numel()

    @property
    def classes(self) -> int:
        return self.first_K.numel()

    @cached_property
    def sorted_ids(self) -> SortedIds:
        """As kernels go through them; waits for the device, so once a run."""
        return SortedIds.of(self.class_V, self.size_K)

    def project(self, z_CV: Tensor) -> Tensor:
        """[C, K], log of the sum of exp(z) over the ids of each class: logits whose softmax has the masses of the classes.

        Args:
            z_CV: logits, or log-probabilities.
        """
        class_CK = z_CV.index_select(-1, self.first_K)
        for bucket in self.buckets:
            member_Cns = z_CV.index_select(-1, bucket.ids_ns).view(len(z_CV), -1, bucket.size)
            if bucket.is_filler_ns is not None:
                member_Cns.masked_fill_(bucket.is_filler_ns, -torch.inf)
            class_CK.index_copy_(-1, bucket.class_n, member_Cns.logsumexp(-1))
        return class_CK

    def spread(self, grad_CK: Tensor, z_CV: Tensor, class_CK: Tensor) -> Tensor:
        """[C, V], a gradient on `class_CK = project(z_CV)` as one on `z_CV`: each id gets its share of its class."""
        grad_CV = grad_CK.index_select(-1, self.class_V)
        for bucket in self.buckets:
            share_Cns = z_CV.index_select(-1, bucket.ids_ns).view(len(z_CV), -1, bucket.size)
            whole_Cn = class_CK.index_select(-1, bucket.class_n)
            empty_Cn = torch.isneginf(whole_Cn)  # a class without mass has no gradient either
            share_Cns.sub_(whole_Cn.masked_fill_(empty_Cn, 0)[..., None]).exp_()
            share_Cns.mul_(grad_CK.index_select(-1, bucket.class_n)[..., None])
            # A repeated id is written the same number again.
            grad_CV.index_copy_(-1, bucket.ids_ns, share_Cns.view(len(z_CV), -1))
        return grad_CV

    @classmethod
    def of(cls, class_V: Tensor, classes: int, side: str) -> SideOfClasses:
        """From the class of each id; waits for the device, so once a run.

        Args:
            class_V: int64, on the device of the losses.
            classes: K.
            side: of which, for the error.
        Raises:
            DataError: a class without an id on this side, or one beyond K.
        """
        host_V = class_V.cpu().numpy()
        if host_V.size and not 0 <= host_V.min() <= host_V.max() < classes:
            raise DataError(f"classes of the {side} must lie in 0..{classes - 1}, found {host_V.min()}..{host_V.max()}")
        order_V = np.argsort(host_V, kind="stable")
        size_K = np.bincount(host_V, minlength=classes)
        if (size_K == 0).any():
            raise DataError(f"class {int(size_K.argmin())} of {classes} has no id of the {side}")
        start_K = np.cumsum(size_K) - size_K
        device = class_V.device
        buckets = []
        larger = np.flatnonzero(size_K > 1)
        larger = larger[np.argsort(size_K[larger], kind="stable")]
        while larger.size:
            smallest = int(size_K[larger[0]])
            count = int(np.searchsorted(size_K[larger], max(smallest, int(smallest * _GROWTH)), side="right"))
            class_n, larger = larger[:count], larger[count:]
            size_n, size = size_K[class_n], int(size_K[class_n[-1]])
            place_ns = np.minimum(np.arange(size)[None], size_n[:, None] - 1) + start_K[class_n][:, None]
            filler_ns = np.arange(size)[None] >= size_n[:, None]
            buckets.append(
                Bucket(
                    torch.from_numpy(class_n).to(device),
                    torch.from_numpy(order_V[place_ns].reshape(-1)).to(device),
                    torch.from_numpy(filler_ns).to(device) if filler_ns.any() else None,
                    size,
                )
            )
        return cls(class_V, torch.from_numpy(order_V[start_K]).to(device), tuple(buckets), size_K)
