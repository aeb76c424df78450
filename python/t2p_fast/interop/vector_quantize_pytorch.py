# SPDX-License-Identifier: Apache-2.0
"""vector-quantize-pytorch's quantiser on the kernels of `vq`; it need not be installed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from t2p_fast.interop._codebook import Codebook, Weight, unit
from t2p_fast.nn.vector_quantizer import distributed, rotate_gradient

__all__ = ["LossBreakdown", "VectorQuantize"]


class LossBreakdown(NamedTuple):
    """The terms of the loss, each without its weight; 0 for those that are off."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Takes the place of `vector_quantize_pytorch.VectorQuantize` (1.32)::

        from t2p_fast.interop.vector_quantize_pytorch import VectorQuantize

    Arguments, results, random draws and state dicts are those of that class, so that a checkpoint
    goes either way and training goes on where it was. What differs: the index is that of a true
    nearest code where rounding decides there; the returned codes are codes to the bit, where there
    ``x + (code - x)`` is rounded; no matrix of distances is stored; nothing depends on the number
    of threads. With a mask, what is projected or split into heads is compared with its codes, which
    fails there. Across processes, samples for k-means and dead codes come from rank 0's batch.

    Not carried out, with a NotImplementedError that names them: `affine_param`,
    `sync_affine_param`, `codebook_diversity_loss_weight`, `commitment_use_cross_entropy_loss`,
    `stochastic_sample_codes`, `straight_through` without `route_gradients_to_input`, and in
    `forward` `indices`, `topk` and `codebook_transform_fn`. On a GPU, `use_cosine_sim` has no
    kernel yet.

    Args:
        dim: channels of the input.
        codebook_size: number of codes.
        codebook_dim: channels of a code, `dim` if not given; otherwise the input is projected.
        heads: how many codes make an output; each is of `codebook_dim` channels.
        separate_codebook_per_head: whether each head has codes of its own.
        decay: of the moving averages.
        eps: of the Laplace smoothing of their counts.
        freeze_codebook: whether training leaves the codes alone.
        kmeans_init: whether the first batch places the codes by k-means, in `kmeans_iters` rounds,
            which `sync_kmeans` shares between processes.
        use_cosine_sim: whether vectors and codes are scaled to length 1.
        layernorm_after_project_in: whether a layer norm follows the projection.
        threshold_ema_dead_code: a code that fewer vectors choose becomes one of the input's.
        channel_last: whether channels are last, or in dimension 1.
        accept_image_fmap: takes ``[b, c, h, w]``.
        accept_3d_fmap: takes ``[b, c, d, h, w]``.
        commitment_weight: of ``mean((x - sg(code))^2)``.
        orthogonal_reg_weight: of the codes' squared cosines, of the codes in use
            (`orthogonal_reg_active_codes_only`) and of at most `orthogonal_reg_max_codes` of them.
        straight_through: the gradient passes the codes as it is, which is also so if neither this
            nor the next two are chosen.
        rotation_trick: it passes rotated (Fifty et al. 2024); by default where ``dim > 1``.
        directional_reparam: the output is the input moved by its distance to the code, in the
            code's direction with noise of `directional_reparam_variance`.
        sync_codebook: whether processes share averages; by default if there are several.
        ema_update: whether codes are moving averages.
        vq_bridge: a module that makes the codes from ``[g, k, d]`` parameters.
        manual_ema_update: whether the caller moves the codes, by `_codebook.update_ema()`.
        learnable_codebook: whether codes have a gradient.
        in_place_codebook_optimizer: makes an optimiser for parameters; it takes a step on the codes
            in every forward, or only when `update_in_place_optimizer` is called
            (`manual_in_place_optimizer_update`).
        sync_update_v: how much stronger the gradient passes.
        return_zeros_for_masked_padding: whether masked positions are 0, or the input.
        route_gradients_to_input: whether the gradient passes the codes at all.

    Raises:
        NotImplementedError: An option is not carried out.
        ValueError: Options exclude each other.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,  # noqa: ARG002
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,  # noqa: ARG002
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,  # noqa: ARG002
        affine_param_codebook_decay: float = 0.9,  # noqa: ARG002
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        _refuse(
            affine_param=affine_param,
            sync_affine_param=sync_affine_param,
            codebook_diversity_loss_weight=codebook_diversity_loss_weight > 0,
            commitment_use_cross_entropy_loss=commitment_use_cross_entropy_loss,
            stochastic_sample_codes=stochastic_sample_codes,
        )
        if straight_through and not route_gradients_to_input:
            raise NotImplementedError(
                "VectorQuantize: straight_through without route_gradients_to_input is not carried "
                "out: it needs the distances to all codes"
            )
        own_gradient = directional_reparam or vq_bridge is not None
        ema_update = not own_gradient if ema_update is None else ema_update
        learnable = own_gradient if learnable_codebook is None else learnable_codebook
        if rotation_trick is None:
            rotation_trick = not directional_reparam and dim > 1
        _exclude(
            (straight_through + rotation_trick + directional_reparam > 1,
             "at most one of straight_through, rotation_trick (on unless it is False) and "
             "directional_reparam"),
            (use_cosine_sim and learnable, "no learnable_codebook with use_cosine_sim"),
            (directional_reparam and threshold_ema_dead_code == 0,
             "a threshold_ema_dead_code with directional_reparam"),
            (straight_through and learnable, "no learnable_codebook with straight_through"),
            (ema_update and learnable, "ema_update=False with learnable_codebook"),
            (vq_bridge is not None and not learnable, "learnable_codebook with vq_bridge"),
            (not 0 <= sync_update_v <= 1, f"0 <= sync_update_v <= 1, got {sync_update_v}"),
            (sync_update_v > 0 and not learnable, "learnable_codebook with sync_update_v"),
        )  # fmt: skip
        self.dim, self.heads, self.codebook_size = dim, heads, codebook_size
        self.separate_codebook_per_head = separate_codebook_per_head
        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_weight = commitment_weight
        self.learnable_codebook = learnable
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        if orthogonal_reg_active_codes_only and heads > 1 and separate_codebook_per_head:
            raise ValueError(
                "VectorQuantize: orthogonal_reg_active_codes_only needs one codebook for all heads"
            )
        self.rotation_trick = rotation_trick
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.sync_update_v = sync_update_v
        self.route_gradients_to_input = route_gradients_to_input
        self.use_cosine_sim = use_cosine_sim
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            num_codebooks=heads if separate_codebook_per_head else 1,
            heads=heads,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_ddp=distributed() if sync_codebook is None else sync_codebook,
            learnable_codebook=learnable or self.has_codebook_orthogonal_loss,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
            vq_bridge=vq_bridge,
        )
        self.in_place_codebook_optimizer = None
        if in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(
                self._codebook.parameters()
            )
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.channel_last = channel_last
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.freeze_codebook = freeze_codebook

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes ``[k, d]``, or ``[h, k, d]`` with a codebook for each head."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes[None])

    @property
    def _channels_first(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes by index, with the channels where the input has them."""
        codes = self._codes(indices)
        return codes.movedim(-1, 1) if self._channels_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The same, after the projection to `dim` channels."""
        codes = self._codes(indices)
        if self.heads > 1 and not self.separate_codebook_per_head:
            codes = codes.flatten(-2)
        output: Tensor = self.project_out(codes)
        return output.movedim(-1, 1) if self._channels_first else output

    def _codes(self, indices: Tensor) -> Tensor:
        if not self.separate_codebook_per_head:
            return self.codebook[indices]
        pairs = zip(self.codebook, indices.unbind(-1), strict=True)
        return torch.cat([codes[index] for codes, index in pairs], -1)

    def update_in_place_optimizer(self) -> None:
        """A step of the codes' own optimiser, with gradients averaged over processes."""
        if self.in_place_codebook_optimizer is None:
            return
        if self._codebook.use_ddp:
            for parameter in self._codebook.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def expire_codes_(self, x: Tensor) -> None:
        """In training, gives dead codes new places among ``[b, n, d]``, which is not projected.

        All of the batch is drawn from; vector-quantize-pytorch draws from its first sequence.
        """
        if self.training and self._codebook.threshold_ema_dead_code > 0:
            self._codebook.expire_codes_(*self._split(x, x.ndim - 1))

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Takes vectors into the averages as if they had chosen `indices`; -1 counts as 0."""
        dim = self._channel_dim(x)
        if mask is not None:
            x, dim = x.movedim(dim, -1), x.ndim - 1
        x, dim = self._split(*self._project(x, dim))
        indices = indices.masked_fill(indices == -1, 0)
        if self.heads > 1:
            indices = indices.movedim(-1, dim - 1)
        self._codebook.update(x, dim, indices, mask)

    update_ema_indices = update_indices

    def _channel_dim(self, x: Tensor) -> int:
        return 1 if self._channels_first and x.ndim > 2 else x.ndim - 1

    def _project(self, x: Tensor, dim: int) -> tuple[Tensor, int]:
        if not self.has_projections:
            return x, dim
        return self.project_in(x.movedim(dim, -1)), x.ndim - 1

    def _split(self, x: Tensor, dim: int) -> tuple[Tensor, int]:
        """The vectors as the codebook wants them, and the dimension of their channels."""
        if self.heads > 1:
            x, dim = x.unflatten(dim, (self.heads, -1)), dim + 1
        return unit(x, dim) if self.use_cosine_sim else x, dim

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,  # noqa: ARG002
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[[Tensor], Tensor] | None = None,
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Any, ...]:
        """Quantises `x`.

        Args:
            x: ``[b, n, d]`` or ``[b, d]``; ``[b, d, n]`` without `channel_last`; a picture
                ``[b, d, h, w]`` or a volume ``[b, d, t, h, w]`` where those are accepted.
            mask: ``[b, n]``, which positions count; the others get index -1.
            lens: ``[b]``, how many positions of each sequence count, instead of a mask.
            freeze_codebook: whether this call leaves the codes alone; by default as constructed.
            return_loss_breakdown: whether to return a `LossBreakdown` too.
            ema_update_weight: ``[k]`` or ``[g, k]``, how much of the step's share each code's
                averages take; or a function of the sums and the counts.
            accum_ema_update: only gathers the step's counts and sums, for a later one to take in.
            ema_update: whether this call moves the codes; by default as constructed.
            indices, topk, codebook_transform_fn: not carried out.
            sample_codebook_temp: without `stochastic_sample_codes` it changes nothing.

        Returns:
            The codes in the shape and dtype of `x`; int64 indices in that shape without the
            channels, with several heads as their last dimension; and the loss, a scalar, 0 outside
            of training.
        """
        _refuse(
            indices=indices is not None,
            topk=topk is not None,
            codebook_transform_fn=codebook_transform_fn is not None,
        )
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        dim = self._channel_dim(x)
        if x.ndim < 2 or x.shape[dim] != self.dim:
            raise ValueError(
                f"VectorQuantize: x is {list(x.shape)}, expected {self.dim} channels in dimension "
                f"{dim}"
            )
        given, needs_gradient = x, x.requires_grad
        mask = self._mask(x, dim, mask, lens)
        if mask is not None:
            given = x = x.movedim(dim, -1)
            place, dim = dim, x.ndim - 1
        else:
            place = dim
        projected, channels = self._project(x, dim)
        z, dim = self._split(projected, channels)
        if not self._codebook.initted:
            self._codebook.place_by_kmeans(self._codebook.rows(z, dim, mask))
        quantized, chosen = self._codebook(z, dim)
        quantized = quantized.to(x.dtype)
        if self.training and not freeze:
            self._codebook.update(
                z, dim, chosen, mask, ema_update_weight, accum_ema_update, ema_update
            )
        zero = z.new_zeros((), dtype=torch.float32)
        in_place_loss = zero
        if self.in_place_codebook_optimizer is not None and self.training and not freeze:
            in_place_loss = _squares(quantized, z.detach(), mask)
            in_place_loss.backward()
            if not self.manual_in_place_optimizer_update:
                self.update_in_place_optimizer()
            quantized, chosen = self._codebook(z, dim)
            quantized = quantized.to(x.dtype)

        commitment = orthogonal = zero
        loss = zero.clone().requires_grad_() if self.training else zero
        if self.training:
            codes = quantized if self.learnable_codebook and not freeze else quantized.detach()
            if needs_gradient and self.route_gradients_to_input:
                quantized = self._route_gradient(z, quantized, dim)
            if self.sync_update_v > 0:  # equation 21 of Huh et al., "Straightening Out the
                # Straight-Through Estimator", 2023
                quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
            if self.has_commitment_loss:
                compared = given if mask is not None and z.shape == given.shape else z
                commitment = _squares(codes, compared, mask)
                loss = loss + commitment * self.commitment_weight
            if self.has_codebook_orthogonal_loss:
                orthogonal = self._orthogonality(chosen)
                loss = loss + orthogonal * self.orthogonal_reg_weight

        if self.heads > 1:
            quantized = quantized.flatten(dim - 1, dim)
            chosen = chosen.movedim(dim - 1, -1)
        if self.has_projections:
            quantized = self.project_out(quantized)
        if mask is not None:
            padding = 0.0 if self.return_zeros_for_masked_padding else given
            quantized = torch.where(mask[..., None], quantized, padding)
            chosen = torch.where(mask[..., None] if self.heads > 1 else mask, chosen, -1)
        if mask is not None or self.has_projections:
            quantized = quantized.movedim(-1, place)
        if not return_loss_breakdown:
            return quantized, chosen, loss
        return quantized, chosen, loss, LossBreakdown(commitment, zero, orthogonal, in_place_loss)

    def _mask(self, x: Tensor, dim: int, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        if mask is None and lens is None:
            return None
        if mask is not None and lens is not None:
            raise ValueError("VectorQuantize: expected mask or lens, got both")
        if x.ndim != 3 or self.accept_image_fmap or self.accept_3d_fmap:
            raise ValueError(
                f"VectorQuantize: x is {list(x.shape)}, expected [b, n, d] where there is a mask"
            )
        shape = (x.shape[0], x.shape[3 - dim])
        if lens is not None:
            mask = torch.arange(shape[1], device=lens.device) < lens[:, None]
        assert mask is not None
        if mask.shape != shape:
            raise ValueError(f"VectorQuantize: mask is {list(mask.shape)}, expected {list(shape)}")
        return mask

    def _route_gradient(self, z: Tensor, quantized: Tensor, dim: int) -> Tensor:
        if self.rotation_trick:
            return rotate_gradient(z, quantized.detach(), dim)
        if self.directional_reparam:
            towards = (quantized - z).movedim(dim, -1)
            shape, heads = list(towards.shape), 0 if self.separate_codebook_per_head else 1
            if self.heads > 1:  # which come sooner there
                shape.insert(heads, shape.pop(-2))
            noise = torch.randn(shape, dtype=towards.dtype, device=towards.device)
            if self.heads > 1:
                noise = noise.movedim(heads, -2)
            noisy = towards + math.sqrt(self.directional_reparam_variance) * noise
            moved: Tensor = unit(noisy).detach() * towards.norm(dim=-1, keepdim=True)
            return z + moved.movedim(-1, dim)
        return quantized.detach() + (z - z.detach())

    def _orthogonality(self, chosen: Tensor) -> Tensor:
        """Mean squared cosine of different codes (Shin et al., "Translation-equivariant Image
        Quantizer for Bi-directional Image-Text Generation", 2021, equation 2).
        """
        codes = self._codebook.embed
        if self.orthogonal_reg_active_codes_only:
            codes = codes[:, chosen.unique()]
        count = codes.shape[1]
        if self.orthogonal_reg_max_codes is not None and count > self.orthogonal_reg_max_codes:
            some = torch.randperm(count, device=codes.device)[: self.orthogonal_reg_max_codes]
            codes = codes[:, some]
        codes = unit(codes)
        groups, count, _ = codes.shape
        # |C C^T|^2 = |C^T C|^2, and d < k.
        return (codes.mT @ codes).square().sum() / (groups * count**2) - 1 / count


def _squares(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """The mean squared difference, of all ``[b, n, ...]`` or those that the mask keeps."""
    if mask is not None:
        a, b = a[mask], b[mask]
    return F.mse_loss(a, b)


def _refuse(**options: bool) -> None:
    for name, wanted in options.items():
        if wanted:
            raise NotImplementedError(f"VectorQuantize: {name} is not carried out")


def _exclude(*rules: tuple[bool, str]) -> None:
    for broken, expected in rules:
        if broken:
            raise ValueError(f"VectorQuantize: expected {expected}")
