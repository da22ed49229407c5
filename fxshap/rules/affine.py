"""Operations that are linear (affine) in their varying arguments.

The multipliers of y = A x + b are the entries of A, so that autograd's vector-Jacobian product is
the rule.
"""

from __future__ import annotations

import torch

from fxshap.ops.library import BATCH_NORM
from fxshap.rules.core.generic import generic
from fxshap.rules.core.registry import linear, rule

aten = torch.ops.aten

# Reshaping and rearranging.
linear(
    aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.view_as, aten.permute,
    aten.transpose, aten.t, aten.numpy_T, aten.mT, aten.expand, aten.expand_as, aten.broadcast_to,
    aten.squeeze, aten.unsqueeze, aten.select, aten.slice, aten.narrow, aten.split,
    aten.split_with_sizes, aten.tensor_split, aten.chunk, aten.unsafe_chunk, aten.unsafe_split,
    aten.unsafe_split_with_sizes, aten.hsplit, aten.vsplit, aten.dsplit, aten.unbind,
    aten.unflatten, aten.flatten, aten.ravel, aten.movedim, aten.moveaxis, aten.swapaxes,
    aten.swapdims, aten.diagonal, aten.diag, aten.diag_embed, aten.unfold, aten.as_strided,
    aten.repeat, aten.tile, aten.repeat_interleave, aten.flip, aten.fliplr, aten.flipud, aten.roll,
    aten.rot90, aten.cat, aten.concat, aten.concatenate, aten.stack, aten.hstack, aten.vstack,
    aten.dstack, aten.column_stack, aten.row_stack, aten.block_diag, aten.atleast_1d,
    aten.atleast_2d, aten.atleast_3d, aten.tril, aten.triu, aten.im2col, aten.col2im,
    aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.native_channel_shuffle,
    aten.clone, aten.contiguous, aten.alias, aten.positive, aten.resolve_conj, aten.resolve_neg,
    aten.real, aten.imag, aten.view_as_real, aten.view_as_complex, aten.complex, aten.conj,
    aten._conj, aten.conj_physical, aten._conj_physical,
)  # fmt: skip

# Padding.
linear(
    aten.pad, aten.constant_pad_nd, aten.reflection_pad1d, aten.reflection_pad2d,
    aten.reflection_pad3d, aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d,
    aten._pad_circular,
)  # fmt: skip

# Casts between floating-point types.
linear(aten._to_copy, aten.to, aten.type_as)

# Sums.
linear(
    aten.add, aten.sub, aten.subtract, aten.rsub, aten.neg, aten.negative, aten.sum, aten.mean,
    aten.cumsum, aten.trace, aten.diff, aten.sum_to_size, aten._foreach_add,
)  # fmt: skip

# Average pooling, resampling and Fourier transforms.
linear(
    aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d, aten._adaptive_avg_pool2d,
    aten._adaptive_avg_pool3d, aten.upsample_nearest1d, aten.upsample_nearest2d,
    aten.upsample_nearest3d, aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_trilinear3d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa, aten.fft_fft, aten.fft_ifft, aten.fft_rfft, aten.fft_irfft,
    aten.fft_fft2, aten.fft_ifft2, aten.fft_rfft2, aten.fft_irfft2, aten.fft_fftn, aten.fft_ifftn,
    aten.fft_rfftn, aten.fft_irfftn, aten.fft_hfft, aten.fft_ihfft, aten.fft_fftshift,
    aten.fft_ifftshift, aten._fft_r2c, aten._fft_c2c, aten._fft_c2r,
)  # fmt: skip

# Batch norm with running statistics: our own operator, and the operators that torch may capture.
linear(BATCH_NORM)
rule(aten._native_batch_norm_legit_no_training, aten.batch_norm, linear_in=((0,),))(generic)

# Linear in the values, not in the indices, masks, windows or coordinates: the generic rule where
# those vary.
rule(
    aten.index_select, aten.gather, aten.index, aten._unsafe_index, aten.take, aten.take_along_dim,
    aten.embedding, aten.masked_select,
    aten.istft, aten.gradient,
    linear_in=((0,),), closed_form=False,
)(generic)  # fmt: skip
rule(
    aten.scatter, aten.scatter_add, aten.index_add, aten.index_copy,
    linear_in=((0, 3),), closed_form=False,
)(generic)  # fmt: skip
rule(aten.masked_scatter, aten.index_put, aten._unsafe_index_put, linear_in=((0, 2),),
     closed_form=False)(generic)  # fmt: skip
rule(aten.index_fill, linear_in=((0, 3),), closed_form=False)(generic)
rule(aten.masked_fill, linear_in=((0, 2),), closed_form=False)(generic)
rule(aten.where, linear_in=((1, 2),), closed_form=False)(generic)
linear(aten.slice_scatter, aten.select_scatter, aten.diagonal_scatter, aten.copy)
