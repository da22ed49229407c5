"""Models that compute with complex numbers: spectra, Fourier layers, complex layers, phases."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.networks.mlp import Between
from tests.networks.reports.report import Report

report = partial(Report, family="complex numbers")


def as_real(z: Tensor) -> Tensor:
    """Return the real and the imaginary parts, one after the other."""
    return torch.cat([z.real, z.imag], -1).flatten(1)


class SpectralLayer(nn.Module):
    """A layer of a Fourier neural operator: weights for the lowest modes (Li et al. 2021)."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(channels, channels, modes, dtype=torch.cfloat) / 2)
        self.pointwise = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, channels, size)."""
        spectrum = torch.fft.rfft(x)
        out = torch.zeros_like(spectrum)
        out[..., : self.modes] = torch.einsum(
            "bim,iom->bom", spectrum[..., : self.modes], self.weight.to(spectrum.dtype)
        )
        return functional.gelu(torch.fft.irfft(out, n=x.shape[-1]) + self.pointwise(x))


class FourierOperator(nn.Module):
    """A Fourier neural operator of two layers over a series."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Conv1d(1, 3, 1)
        self.layers = nn.Sequential(SpectralLayer(3, 3), SpectralLayer(3, 3))
        self.head = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, 10)."""
        return self.head(self.layers(self.lift(x[:, None])).flatten(1))


class FourierOperator2d(nn.Module):
    """Two corners of a spectrum of an image, each with weights of its own, in a zero buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.randn(2, 2, dtype=torch.cfloat))
        self.high = nn.Parameter(torch.randn(2, 2, dtype=torch.cfloat))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take images of shape (batch, 5, 2)."""
        f = torch.fft.rfft2(torch.tanh(x))
        out = torch.zeros(f.shape, dtype=f.dtype, device=f.device)
        out[:, :2, :2] = f[:, :2, :2] * self.low
        out[:, -2:, :2] = f[:, -2:, :2] * self.high
        return self.head(torch.relu(torch.fft.irfft2(out, s=x.shape[-2:])).flatten(1))


def low_pass(h: Tensor) -> Tensor:
    f = torch.fft.rfft(torch.tanh(h))
    f[..., 3:] = 0
    return torch.fft.irfft(f, n=h.shape[-1]).sigmoid()


def muted_bands(h: Tensor) -> Tensor:
    f = torch.fft.fft(h)
    f[..., 4:].zero_()
    f[..., 1].mul_(2j)
    return f.abs()


def complex_of(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.reshape(h.shape[0], -1, 2).contiguous())


class ComplexLinear(nn.Module):
    """A linear layer with complex weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, dtype=torch.cfloat) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs, dtype=torch.cfloat) / 2)

    def forward(self, z: Tensor) -> Tensor:
        """Take complex numbers of shape (batch, inputs)."""
        return functional.linear(z, self.weight.to(z.dtype), self.bias.to(z.dtype))


class ComplexNetwork(nn.Module):
    """Two complex layers with an activation between them.

    Parameters
    ----------
    activation : callable
        A function of complex numbers.
    """

    def __init__(self, activation) -> None:
        super().__init__()
        self.first, self.second = ComplexLinear(5, 6), ComplexLinear(6, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Take the real parts and then the imaginary parts of five numbers."""
        z = torch.complex(*x.chunk(2, -1))
        return self.second(self.activation(self.first(z))).abs()


def mod_relu(z: Tensor) -> Tensor:
    """relu(|z| + b) z / |z| (Arjovsky et al. 2016)."""  # noqa: D403
    size = z.abs()
    return functional.relu(size - 0.3) * z / (size + 1e-5)


def mod_relu_by_where(z: Tensor) -> Tensor:
    size = z.abs()
    return torch.where(size > 0.7, (size - 0.7) * torch.sgn(z), torch.zeros_like(z))


def complex_relu(z: Tensor) -> Tensor:
    """relu of both parts (Trabelsi et al. 2018)."""  # noqa: D403
    return torch.complex(functional.relu(z.real), functional.relu(z.imag))


def quadrant_relu(z: Tensor) -> Tensor:
    """z where its angle is between 0 and pi/2, else 0 (Guberman 2016)."""  # noqa: D403
    return z * ((z.real > 0) & (z.imag > 0))


def cardioid(z: Tensor) -> Tensor:
    """(1 + cos(angle)) z / 2 (Virtue et al. 2017)."""  # noqa: D403
    return (1 + torch.cos(z.angle())) * z / 2


def complex_sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


class ComplexNorm(nn.Module):
    """A complex normalisation by hand: whitened by the standard deviation of |z|."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ComplexLinear(5, 6), ComplexLinear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take the real parts and then the imaginary parts of five numbers."""
        z = self.first(torch.complex(*x.chunk(2, -1)))
        z = (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 0.1)
        return as_real(self.second(z * z.conj() * z))


class ComplexConvolution(nn.Module):
    """A complex convolution of a spectrum, with a power for its output."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 3, 3, dtype=torch.cfloat)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, 10)."""
        z = self.convolution(torch.fft.fft(x.to(torch.float32))[:, None])
        return self.head(torch.log1p(z.abs().square()).flatten(1).to(x.dtype))


class Spectrogram(nn.Module):
    """Short-time Fourier transforms of a series, and a function of them.

    Parameters
    ----------
    function : callable
        Maps a complex spectrogram to real features.
    """

    def __init__(self, function) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(4))
        self.function = function
        with torch.no_grad():
            size = self.features(torch.ones(1, 10)).shape[1]
        self.head = nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, 3))

    def features(self, x: Tensor) -> Tensor:
        """Return the features of series of shape (batch, 10)."""
        window = self.window.to(x.dtype)
        z = torch.stft(x, 4, 2, window=window, return_complex=True)
        return self.function(z).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, 10)."""
        return self.head(self.features(x))


def log_power(z: Tensor) -> Tensor:
    return 10 * torch.log10(z.abs().square() + 1e-3) / 4


def magnitude_and_phase(z: Tensor) -> Tensor:
    return torch.cat([z.abs(), z.angle()], 1)


def masked_and_back(z: Tensor) -> Tensor:
    mask = torch.sigmoid(z.abs() - 1)
    return torch.istft(z * mask, 4, 2, window=torch.hann_window(4).to(mask), length=10)


def resynthesised(z: Tensor) -> Tensor:
    again = torch.polar(torch.tanh(z.abs()), z.angle())
    return torch.istft(again, 4, 2, window=torch.hann_window(4).to(again.real), length=10)


def analytic_envelope(h: Tensor) -> Tensor:
    """The envelope and the instantaneous phase of the analytic signal (Hilbert transform)."""
    f = torch.fft.fft(h)
    f[:, 1 : h.shape[1] // 2] *= 2
    f[:, h.shape[1] // 2 + 1 :] = 0
    z = torch.fft.ifft(f)
    return torch.cat([z.abs(), torch.cos(torch.atan2(z.imag, z.real))], 1)


def phase_correlation(h: Tensor) -> Tensor:
    a, b = (torch.fft.rfft(part) for part in h.chunk(2, 1))
    cross = a * b.conj()
    return torch.fft.irfft(cross / (cross.abs() + 1e-2), n=h.shape[1] // 2)


def quaternion_product(h: Tensor) -> Tensor:
    """Hamilton products of quaternions, as pairs of complex numbers."""
    a, b, c, d = complex_of(torch.tanh(h)[:, :8]).unbind(1)
    return as_real(torch.stack([a * c - d.conj() * b, d * a + b * c.conj()], 1))


def rotations(h: Tensor) -> Tensor:
    """Rotary positions by complex numbers, as in Llama's own code."""
    frequencies = torch.polar(torch.ones(6), torch.arange(6.0)).to(complex_of(h).dtype)
    turned = torch.view_as_real(complex_of(h) * frequencies).flatten(1)
    return torch.softmax(turned, 1)


def complex_attention(h: Tensor) -> Tensor:
    z = complex_of(h).reshape(-1, 3, 2)
    weights = torch.softmax((z @ z.mH).abs(), -1).to(z.dtype)
    return as_real(weights @ z)


def holomorphic(h: Tensor) -> Tensor:
    z = complex_of(h)
    parts = [z.exp(), z.tanh(), z.sin(), z.sqrt(), (z + 3).log(), z**3, z**0.5, 1 / (z + 3)]
    return as_real(torch.cat(parts, 1))


def norms(h: Tensor) -> Tensor:
    z = complex_of(h)
    sizes = [z.norm(dim=-1), z.std(-1), z.var(-1), torch.linalg.vector_norm(z, 3, dim=-1)]
    return torch.stack([*sizes, z.abs().amax(-1)], 1)


def loudest(h: Tensor) -> Tensor:
    """Keep the frequencies that are louder than their median (a gate of FEDformer and FreTS)."""
    z = torch.fft.rfft(h)
    size = z.abs()
    kept = z * (size >= size.median(-1, keepdim=True).values)
    return torch.view_as_real(kept).flatten(1)


def qubits(h: Tensor) -> Tensor:
    """The chances of two qubits after rotations, phases, a controlled phase and a Hadamard gate."""
    half, phases = h[:, :2] / 2, torch.exp(1j * h[:, 2:6]).unflatten(1, (2, 2))
    first, second = (torch.stack([half.cos(), half.sin()], -1) * phases).unbind(1)
    hadamard = torch.tensor([[1, 1], [1, -1]]).to(phases) / 2**0.5
    state = torch.einsum("bi,bj->bij", first, second) * torch.sgn(hadamard)
    chances = (hadamard @ state).abs() ** 2
    return torch.cat([chances.sum(2), chances.sum(1)], 1)


def hermitian(h: Tensor) -> Tensor:
    return torch.fft.hfft(complex_of(torch.tanh(h)), n=9).sin()


REPORTS = [
    report("fourier_operator", architecture=FourierOperator, source="neuraloperator, FNO"),
    report(
        "fourier_operator_2d", architecture=FourierOperator2d, shapes=((5, 2),), source="FNO in 2d"
    ),
    report("low_pass", architecture=lambda: Between(low_pass), source="filters of FreTS"),
    report("muted_bands", architecture=lambda: Between(muted_bands), source="band masks"),
    report("mod_relu", architecture=lambda: ComplexNetwork(mod_relu), source="complexPyTorch"),
    report(
        "mod_relu_by_where",
        architecture=lambda: ComplexNetwork(mod_relu_by_where),
        source="unitary recurrent networks",
    ),
    report(
        "complex_relu", architecture=lambda: ComplexNetwork(complex_relu), source="complexPyTorch"
    ),
    report("quadrant_relu", architecture=lambda: ComplexNetwork(quadrant_relu), source="zReLU"),
    report("cardioid", architecture=lambda: ComplexNetwork(cardioid), source="MRI fingerprints"),
    report("complex_tanh", architecture=lambda: ComplexNetwork(torch.tanh), source="complex RNNs"),
    report("complex_sigmoid", architecture=lambda: ComplexNetwork(complex_sigmoid), source="gates"),
    report("complex_norm", architecture=ComplexNorm, outputs=6, source="Trabelsi et al. 2018"),
    report("complex_convolution", architecture=ComplexConvolution, source="radar"),
    report("magnitude_spectrogram", architecture=lambda: Spectrogram(torch.abs), source="audio"),
    report("log_power", architecture=lambda: Spectrogram(log_power), source="torchaudio"),
    report(
        "magnitude_and_phase", architecture=lambda: Spectrogram(magnitude_and_phase), source="EEG"
    ),
    report(
        "masked_and_back", architecture=lambda: Spectrogram(masked_and_back), source="denoising"
    ),
    report("resynthesised", architecture=lambda: Spectrogram(resynthesised), source="vocoders"),
    report(
        "analytic_envelope", architecture=lambda: Between(analytic_envelope), source="EEG, Hilbert"
    ),
    report("phase_correlation", architecture=lambda: Between(phase_correlation), source="GCC-PHAT"),
    report("quaternion_product", architecture=lambda: Between(quaternion_product), source="QNNs"),
    report("rotations", architecture=lambda: Between(rotations), source="Llama's apply_rotary_emb"),
    report("complex_attention", architecture=lambda: Between(complex_attention), source="DCNs"),
    report("holomorphic", architecture=lambda: Between(holomorphic), source="functions of z"),
    report("complex_norms", architecture=lambda: Between(norms), source="sizes of z"),
    report("loudest", architecture=lambda: Between(loudest), source="FEDformer, FreTS"),
    report("qubits", architecture=lambda: Between(qubits), source="TorchQuantum"),
    report("hermitian", architecture=lambda: Between(hermitian), source="torch.fft.hfft"),
]
