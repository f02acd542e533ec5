"""Small layers as other libraries quantized and stored them, and sums of the weights that they dequantize to.

8 outputs and 64 inputs; the weight is that of `weight()`. Made with torchao 0.18, SDNQ 0.2.8 and bitsandbytes 0.50.2.
"""

from __future__ import annotations

import base64

import torch
from torch import Tensor

ROWS, COLUMNS = 8, 64


def weight() -> Tensor:
    """The weight that was quantized, (8, 64)."""
    index = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS)
    return ((index * 37 % 251) - 125).float() / 64 + ((index * 11 % 13) - 6).float() / 7


def tensors(case: str) -> dict[str, Tensor]:
    """The stored tensors of a case, by their names in the layer."""
    found = {}
    for name, (dtype, shape, text) in STORED[case].items():
        data = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        found[name] = data.view(getattr(torch, dtype)).reshape(shape)
    return found


def sums(values: Tensor) -> list[float]:
    """The sum of the values, their sum weighted by position, and the largest magnitude."""
    positions = torch.arange(values.numel()).view(values.shape)
    return [float(values.double().sum()), float((values.double() * positions).sum()), float(values.abs().max())]


# fmt: off
SUMS: dict[str, list[float]] = {
    "torchao int8": [-5.182775143533945, -1074.588895658031, 2.821288585662842],
    "torchao fp8": [-5.22606740728952, -995.1229713438079, 2.810267925262451],
    "torchao int4": [-9.316667288541794, -1951.376908928156, 2.997619152069092],
    "sdnq int8": [-5.035065131261945, -1054.3757650442421, 2.810267925262451],
    "sdnq uint4": [-2.736600637435913, -487.6624101251364, 2.810267925262451],
    "sdnq int4": [-10.308673173189163, -2113.3978594243526, 2.810267925262451],
    "sdnq svd": [-5.690453764051199, -1345.8751766383648, 2.8658030033111572],
    "sdnq fp8": [-5.22606740728952, -995.1229713438079, 2.810267925262451],
    "bitsandbytes plain": [-7.87109375, -1796.87890625, 2.8125],
    "bitsandbytes nested": [-7.78515625, -1771.1650390625, 2.8125],
    "bitsandbytes int8": [-4.994372755289078, -1040.7395850960165, 2.810546875],
}
"""Of the weights that the libraries dequantize to, by case."""
STORED: dict[str, dict[str, tuple[str, list[int], str]]] = {
    "torchao int8": {
        "_weight_qdata": ("int8", [8, 64], (
            "gOLv/QoXJNTh7vwJFiTT4O77CBV30uDt+gcVdtLf7PkHaMPR3uv5BmfD0N3q+Flmws/c6vdYZsHO3OlKWGXAzc/hYHGarL3OTl9w"
            "mau8zU1eb5iquzpMXW6XqLo5SlyFlqcnOElbhJWmJjdIWoOUEyU2R1mCkxIkNUZYgAARIzQ5iJb/DRwqOIfw/gwbKTeG7/0MGig2"
            "4O78CxknNt/t/AoYJtDe7PsJFybP3ev6CBZ/ztzr+QcWf83b6vgGb77M1eX2Bn+zw9Tk9W5+ssLT4/RtfbHB0uJcbHywwNHhWmue"
            "r7/QSVlqna6+z0hYaZytvTZHV2ibrLw1RlaKmqskND5NlaSyHy49TJSjEB8tPEuTog8eLTtKkv8OHSw6gpH+DRwrOoHu/QwbKjmA"
            "7vwLGik43u37ChkoN93s+wkYJ83d6/oIFyXO3Ov5BxZ/zdvq+AYVf8za6fcGb73L2uj2BW68ytnn9V9uu8nY5vVebbrJ1+VPXWy5"
            "yNbkTl2quMfVQVBfprXE00BPXqW0wzFAT12ks8IwP05do7IgLz5Nk6KxHy49TJKhDx4tPEuRoA4dLDtKkP4NHCs6gI/9DBsqOYTu"
            "/QsaKDaD7fwKGSc23uz7CRgmNd3r+ggXJc7c6/kIFiTN2+r4BxV/zNrp9wYUf8vZ6PYFb7zK2ef2BG67ydg="
        )),
        "_weight_scale": ("float32", [8, 1], (
            "/o+0PB1Bijzxgqc8JEiRPOt8oTzwgaY8ezKgPO+ApTw="
        )),
        "_weight_zero_point": ("int8", [8, 1], (
            "AAAAAAAAAAA="
        )),
    },
    "torchao fp8": {
        "_weight_qdata": ("float8_e4m3fn", [8, 64], (
            "/u3n1GFqcPLu59dganDy7ujZXml98u7o2l1pffLv6dxce/Xy7+ndWnv18+/p33p79vPw6uB6e/bz8Op4env28/Pue3z7+ffzeXp8"
            "+/n383h6fPv593V4enz8+vd1eHr+/PpxdHh6/vz6cHR4ev78aHB0eHr+/GhwdHd6/q9nb3N1/fzGZGxxdP3mzWNscXT959Jia3F0"
            "7ujVYWtxdO/o2GFrcPPv6dlganDz7+nbXmp+8/Dp3F1pfvPw6t5bfPfz8ezhW3749fLs4nx++fby7eN8fvn28u16fH759vLtenz7"
            "+fbzeHp8+/n283h6fPv593R4env7+fd0d3n9+/lwdHZ4/Pr5bnJ1ePz6Zm1ydXj8+mVtcnV4/MVkbXJ1/vzNY2xxdf7n0mNscXT+"
            "6NVia3F07+nYYWtxdO/p2mBrcfPv6dteanDz8OncXWp+8/Dq3ltpfvPw6t9afPf08OvgWHz39PHr4Xp89/Tx6+J6fPf08ex5enz4"
            "9PHseXr5+PXxdnl6+vj18nZ5evr49XN2eXr6+PZydnl6+vlucnZ4/Pr5bnJ1ePz6ZW1ydXj8+2RtcnV4/MxkbHF1/vzRY2xxdf7o"
            "1GJrcXT+6Ndha3F07+nZYGpwdO/p219qcPPw6dxdanDz8OreXGl+8/Dq31ppfvTw6+BZfPf08evhVnz39PE="
        )),
        "_weight_scale": ("float32", [8, 1], (
            "EI3NO0VjnTuisb47RWOlOzXWtzsQjb07Cl62O35ovDs="
        )),
    },
    "torchao int4": {
        "_weight_qdata": ("int8", [8, 64], (
            "+P7/AAEBAv3+/wABAQL9/v8AAAEH/f7/AAABB/3+/wAAB/z9/v//AAf8/f3+/wYH/Pz9/v8GB/v8/f4FBgf7/P3+Bgf6+/z9BQYH"
            "+vv8/QUGB/r7/AQFBgf6+/wDBQb4+vsCAwQF+fr7AgMEBfn6AQIDBAX5+gECAwQF+AABAgME+fkAAQIDA/n/AAECAwP5/wABAgID"
            "/v8AAQICA/7/AAEBAv3+/wABAQL9/v8AAAEH/f7/AAABB/3+/wAAB/z9/f7/AAf7/P3+/wYH+/z9/v8GB/v8/f4FBgf7/P3+BQb6"
            "+/z9BQYH+vv8/QUGB/r7/AMFBgf6+/wDBAX4+vsCAwQF+vr7AgMEBfr6AQIDBAT5+gECAwQE+QABAgMD+PkAAQIDA/n/AAECAgP4"
            "/wABAgID/v8AAQECA/7/AAEBAv3+/wAAAQL9/v8AAAEH/f7/AAABB/3+//8AB/z9/v//AAf7/P3+/wYH+/z9/v8GB/v8/f4FBgf7"
            "/P3+BQb6+/z9BQYH+vv8/QQFB/r7/AMEBQb6+/wDBAUG+vsCAwQF+Pr7AgMEBPr6AQIDBAT5+gECAwME+QABAgMD+PkAAQICA/n/"
            "AAECAgP5/wABAQID/v8AAQECA/7/AAEBAv3+/wAAAQL9/v8AAAEH/f7//wABB/3+//8AB/z9/v//AAb8/f4="
        )),
        "_weight_scale": ("float32", [8, 2], (
            "/ti/PsulnD7gBI4+L+WSPqmDqj4g+7E+plyaPvEVjz6SJKk+upSrPg/qsD6VS5k+Fl+RPqM1qj7Lpaw+/tivPg=="
        )),
        "_weight_zero_point": ("int8", [8, 2], (
            "AAAAAAAAAAAAAAAAAAAAAA=="
        )),
    },
    "sdnq int8": {
        "weight": ("int8", [8, 64], (
            "geLv/QoXJNTh7/wJFiPT4e77CBV30+Dt+gcVdtLf7PkHaMTR3uv5BmfD0N3r+Flmws/c6vdYZcHO3OlKV2TAztDhYHGbrL3OTV9w"
            "mqu8zUxeb5mquzpLXG6Yqbo5SluFlqgnOElahJWnJjdIWYOUEyQ2R1iCkxIjNUZXgQARIjQ5iJb/DRwqOIfw/gwbKTeG7/0MGig2"
            "4O78CxknNd/t/AoYJtDe7PsJFyXP3ez6CBZ/ztzr+QcVfs3c6vgGb77M1eX2Bn+zxNTk9W5+ssPT4/RtfbHC0uJbbHywwdHhWmuf"
            "r8DQSVlqnq6/z0hYaZ2tvjZHV2icrL01RlaKm6skND5NlaSzHy49TJSjEB4tPEuTog8eLDtKkv8OHSs6g5L+DRwrOYLv/QwbKjiB"
            "7vwLGik33u37ChkoN93s+wkYJ83d7PoIFyXO3Ov5BxZ/zdvq+AYVfszb6fcGb73L2uj2BW68y9nn9V9tu8rY5vVebLrJ1+VPXWu6"
            "yNblTlyqucfVQVBfprXE00BPXqW0wzA/Tl2ks8IwPk1co7IgLz5MlKKxHy49S5OiDx4tPEuSoQ4dLDtKkf4NHCs6gZD9DBsqOYTu"
            "/QsZKDaD7fwKGSc13uz7CRgmNN3s+ggXJc7c6/kHFiTN2+r4BxV/zNrp9wYUfsva6PYFb7zK2ef2BG67ydg="
        )),
        "scale": ("float32", [8, 1], (
            "+kW1PHXMijzGK6g8kdqRPK0fojzCKac88dOgPL0npjw="
        )),
    },
    "sdnq uint4": {
        "weight": ("uint8", [256], (
            "YIeYWnaIqWV3mF92h/lld/YQQ2UPMVT+EEPlDyHE/hBl/iFU7R8y1f4hw+0fMtsOMdv+ELPtD6HL/hC67A+pyw+h2/6QuuwPqcv+"
            "mLrsf6l2GEJlhyFUdh8yZfchU+YQQ2UPMVT+EEPlDyHE/hBC7CFU7R9C1f4hw+0fMtsOIbr+IcTtH6Lc/iHK7R+p2w6R2/6Quu0P"
            "qcv+mLrsf6nLbkJlhyFUdh8yZfchU+YQMmQfQmX+IVPmHzLV/iFD7RAy7R9C1f4hw+0fMtz+IbrtEMTtH7Lc/iHK7R+p2w6Ruu2Q"
            "uu0Pqdv+mLrsj6nLbpe6hyFUdh9CZfchU+YQMmQOIQ=="
        )),
        "scale": ("float32", [8, 2, 1], (
            "l3K5PsulfD4FTog+t217PqQ1ej7yFYc+t217Pvuxhz4FTog+kP14PvIVhz4FTog+BU6IPvuxhz59xXc++7GHPg=="
        )),
        "zero_point": ("float32", [8, 2, 1], (
            "btszwAAAtL+SJAXA3LYJwG7bH8Bu26y/AAC2v5IkBsBJkh7AbtsgwG7brr/btt+/JUkIwEmSH8Bu2yHAkiSzvw=="
        )),
    },
    "sdnq int4": {
        "weight": ("uint8", [256], (
            "YYeZanaIqWaHmF92iOllh/hUdodPZXf+VGbnT2XW/lRl7TJU3C5Dxe0ytNwuQ8sdMrrcIaPLHZK63CGpyx2YuhuCqbpxmKobh5m6"
            "dpipa4eZWnaIqWWHmF92iPllh+hUdodPZXb+VGbnT1XW/lRl7TJU3C5Dxe0ytNwuQ8sdMrrLMqS7LJO6yzKpuiyYqhuCqbpxmKkb"
            "h5m6dpipa4eZWnaIqWWHmF92iPllh+hUdodPZXb+VGXnT1TW/kRl7TNU3C5Dxe0ytNwuQ8vtMrrcIaS7LJOqyzKpuiyYqhuCmbpx"
            "mKkbh5m6dpipa4eYWnaIqWWHmF92iPlld+hUdodOZQ=="
        )),
        "scale": ("float32", [8, 2, 1], (
            "EI3NPjXWpz7LKZg+RWOdPqKxtj6isb4+RWOlPl5OmT54ObU+Nda3PhCNvT6yPqQ+T8GbPgpetj7H+rg+fmi8Pg=="
        )),
    },
    "sdnq svd": {
        "weight": ("uint8", [256], (
            "cBQDcChkIoJCJjlWd/ADQoFSZCYiRWY5gHc3D0h30Vd12KBXjTtv1rjzx22OY2wYG5igk3IJOppo9LGHdn+GEw2oirbxepscr7fI"
            "97d33Gg3KCumg7JiSS9omvMCdqJgpgY9l3j3solnL37Z2MlHxLB1a0tct7am1l1/aE1FmKrAVWIoL4d39GJoeUyMZQdkhMXANlsM"
            "bPbhyJYYnjxMWxjYkpXHO19ovPPWq5xynQgseYbVkGZIbk721elEv+MxNwUslJHGohppLIv2xZZog4A2PGpZw6OHmkyPlQlDlZbI"
            "mMo+ncr73Kms2q69DX24eKqXiJ56ifS6ibmgizgOig=="
        )),
        "scale": ("float32", [8, 2, 1], (
            "EUv3PRN5+z3+yQ4+rvD1PRwIKz4BVxU+XMkZPtXUIT76tTA+fWH0PWzB+j21bcw9rY7fPdSc6T2XLhI+eu04Pg=="
        )),
        "zero_point": ("float32", [8, 2, 1], (
            "N8kBv2VBH7/f8Ju/WPJEv5x2vb+/Ymm/5MaYv2TUp7/t85W/KApnvzQqhb/VYUG/WA8zv67jU78X1Ly/vHPPvw=="
        )),
        "svd_up": ("float32", [8, 4], (
            "n9TQQIm7+79bcbNALAuNv/IiDsG2NIRAsDVDQMiD0r+GIXxAdXadPkh8ob+sfKHA7Cj8wIvKysB/L5u/DH10v9+spUCNT0VAKOeo"
            "wHe+ob//j8Q/i7/mwB6G+b8wlZVAgIUQP2yuHEHf/GA/1aqBQHp2YUASilrAQf+OQDI5Ej8="
        )),
        "svd_down": ("float32", [4, 64], (
            "jsJfvIoSqDvshBG+Yn7svRBv1rxR8hY+dhEPPnyqFD3HXoK9y4zlvSXENL5oSls89LgiPmMuEz5hPoE9rA2DvbA75r2aGzW+PNNV"
            "PIBhIj4sVUY+ARm6u0QhC73NojG+D5kMvqEeyTyF5ww+SxYnPlcHxbtpyfK9dmI7vtrK4jukGhw+TQ5APj96Qby2PCS9qek3vvDf"
            "Er7C55Y8kDcgPuKCWz5w8Ua8gZolvR1BOL5gNxO+KyyUPFpeUz7nEhU+bHuSPCrXz72Tvg++wXAHvokTtTzo0m4+AxC0Pd6/jzwQ"
            "htC9PX4ZvjLIB759F00+CswOPg+N8T3iZNy9cAUWvhQJJj5WQOQ9rb+4PUH6m73cfUy+1C+Nvd5Nz7uZ6xU+mWAUPqgVvj3JMwK+"
            "NOYyvukFAr7aD5U95bDzPW6BFD5QV7498xICvmHFMr4V5QG+y6lpPd0YHD5oLBc+/9MrPZr20L1fM26+b8aZPZvMsz2wORw+5Q3D"
            "PVNv/70UajC+lxP/vfQWcz0ldB4+s4cZPihBNT0GQMy9FthrvrodOr1YygI9+pQePomoGT5+xDU9XP7LvUG3a76jk3q9/uWFPfg/"
            "IT7C48o9ixGOPS1tIb7ltBq+InC1va9F/T3MYCE+bSXLPcpHx71ZTCG+gSZxvZScij3UTQE+VprPPR/Ikj0pQbS+qMbEvSTORT6I"
            "TxY+wp04PNMP5bz1TdY8I8p6vpw3G70tHi0+kuP5PY0+vb0Xnoa9aOEtPenBI772eB691k0sPuZC+D053769xD6IvY4wGT74WNC9"
            "XZyAvRjwEj6Awo88rRwGvu8g5Dyc11o9pPnRvZlZHT5sWto9scfcvTwnpr1SPAo+cEHuvdSEnr3b+wM+IAVBO+oQFb4HyoS9jERh"
            "Ph7i772DJaC9hSsDPjDvDDtB4RW+wEwtPf1sjj7+oBC+AuHSvQ4TyDxO5RG9pTIFvmtbAj58DcU9VnERvrCB1L38B0y8qiYVvaD3"
            "4jzf8oY+na2TPXrJ8L1e4iA8TN+tvD7jaj7il4Y+LCvCveAzFb2dr5K8Gm0lvrCpUr2+lz8+l9oJPrJB+72IBpe9S1rePQ+TXr3Y"
            "nBy9wss/PpwOCj6n2fq9fJ6WvVXC3j2IJq29auWkvVXacT2yBts9IKMjvmnPWD12o0+9lFbKvV59pL2Byg0+32HzvbAmj70iOuY9"
            "vK6lvZ1tnb32ZIA9fX7iPTrnH77+vmc9Z+VgPlCoir2TBZ29/8yAPYjm4j01sx++Fo9oPej2QT5NP+G99tdRvvJsDz3veZY94IDx"
            "vB7sJz4fek8+3oYMvvCjUb4JPRA9TvcbvrLg77zNskU+g8fZvQXuh76HXB49vPGdPQ=="
        )),
    },
    "sdnq fp8": {
        "weight": ("float8_e4m3fn", [8, 64], (
            "/u3n1GFqcPLu59dganDy7ujZXml98u7o2l1pffLv6dxce/Xy7+ndWnv18+/p33p79vPw6uB6e/bz8Op4env28/Pue3z7+ffzeXp8"
            "+/n383h6fPv593V4enz8+vd1eHr+/PpxdHh6/vz6cHR4ev78aHB0eHr+/GhwdHd6/q9nb3N1/fzGZGxxdP3mzWNscXT959Jia3F0"
            "7ujVYWtxdO/o2GFrcPPv6dlganDz7+nbXmp+8/Dp3F1pfvPw6t5bfPfz8ezhW3749fLs4nx++fby7eN8fvn28u16fH759vLtenz7"
            "+fbzeHp8+/n283h6fPv593R4env7+fd0d3n9+/lwdHZ4/Pr5bnJ1ePz6Zm1ydXj8+mVtcnV4/MVkbXJ1/vzNY2xxdf7n0mNscXT+"
            "6NVia3F07+nYYWtxdO/p2mBrcfPv6dteanDz8OncXWp+8/Dq3ltpfvPw6t9afPf08OvgWHz39PHr4Xp89/Tx6+J6fPf08ex5enz4"
            "9PHseXr5+PXxdnl6+vj18nZ5evr49XN2eXr6+PZydnl6+vlucnZ4/Pr5bnJ1ePz6ZW1ydXj8+2RtcnV4/MxkbHF1/vzRY2xxdf7o"
            "1GJrcXT+6Ndha3F07+nZYGpwdO/p219qcPPw6dxdanDz8OreXGl+8/Dq31ppfvTw6+BZfPf08evhVnz39PE="
        )),
        "scale": ("float32", [8, 1], (
            "EI3NO0VjnTuisb47RWOlOzXWtzsQjb07Cl62O35ovDs="
        )),
    },
    "bitsandbytes plain": {
        "weight": ("uint8", [256, 1], (
            "BGeJo0Z4mjRXifNFaJ80Vo4jRWjiNFbuI0Vu4jRd7iM07xEj3vESPe8RLN7xEs3gEbzeARvN4Bms3gCazeB5rMAXirwGeKvAZ4m8"
            "RXibxFeJs0V4mzRWifNFaJ80Vo8jRWjyI1b/IjVu8SNe7xI07hEj3uESPe4RLN7hEs3gEazNESq80RmrzQGKvNB4q8AHirwGeKvA"
            "V4m8RXibxFeJs0VomjRWifNFaJ80Vo8jRWfyNFbuI0Vu4jRd7iNF3hI03eEiPd4SK83hIrzeEqvNARq80BirzQGKvNB4q8AHirwF"
            "eJvAV4m8RXibxFaJs0VomjRWifNFaJ80Vn8jRWfyNA=="
        )),
        "weight.absmax": ("float32", [8], (
            "AAA0QAAACkAAACdAAAARQAAAIUAAACZAAAAgQAAAJUA="
        )),
        "weight.quant_map": ("float32", [16], (
            "AACAv7E5Mr8wawa/oDLKvk2ikb4/NT2+cXi6vQAAAAD/+qI948okPt0EfD46A60+uKThPqsHED+zEzk/AACAPw=="
        )),
        "weight.quant_state.bitsandbytes__nf4": ("uint8", [77], (
            "eyJxdWFudF90eXBlIjogIm5mNCIsICJibG9ja3NpemUiOiA2NCwgImR0eXBlIjogImJmbG9hdDE2IiwgInNoYXBlIjogWzgsIDY0"
            "XX0="
        )),
    },
    "bitsandbytes nested": {
        "weight": ("uint8", [256, 1], (
            "BGeJo0Z4mjRXifNFaJ80Vo4jRWjiNFbuI0Vu4jRd7iM07xEj3vESPe8RLN7xEs3gEbzeARvN4Bms3gCazeB5rMAXirwGeKvAZ4m8"
            "RXibxFeJs0V4mzRWifNFaJ80Vo8jRWjyI1b/IjVu8SNe7xI07hEj3uESPe4RLN7hEs3gEazNESq80RmrzQGKvNB4q8AHirwGeKvA"
            "V4m8RXibxFeJs0VomjRWifNFaJ80Vo8jRWfyNFbuI0Vu4jRd7iNF3hI03eEiPd4SK83hIrzeEqvNARq80BirzQGKvNB4q8AHirwF"
            "eJvAV4m8RXibxFaJs0VomjRWifNFaJ80Vn8jRWfyNA=="
        )),
        "weight.absmax": ("uint8", [8], (
            "9wDNFqfKX8c="
        )),
        "weight.quant_map": ("float32", [16], (
            "AACAv7E5Mr8wawa/oDLKvk2ikb4/NT2+cXi6vQAAAAD/+qI948okPt0EfD46A60+uKThPqsHED+zEzk/AACAPw=="
        )),
        "weight.nested_absmax": ("float32", [1], (
            "AACyPg=="
        )),
        "weight.nested_quant_map": ("float32", [256], (
            "MzN+v5qZer8AAHe/ZmZzv83Mb78zM2y/mplovwAAZb9mZmG/zcxdvzMzWr+amVa/AABTv2ZmT7/NzEu/MzNIv5qZRL8AAEG/ZmY9"
            "v83MOb80Mza/mpkyvwAAL79mZiu/zcwnvzQzJL+amSC/AAAdv2ZmGb/NzBW/NDMSv5qZDr8AAAu/ZmYHv8zMA78zMwC/MjP5vgAA"
            "8r7MzOq+mpnjvmZm3L4zM9W+AADOvszMxr6amb++Zma4vjMzsb4AAKq+zMyivpqZm75mZpS+NDONvgAAhr6ZmX2+MzNvvs3MYL5m"
            "ZlK+AABEvpqZNb4zMye+zcwYvmZmCr4AAPi9NDPbvYXryb33KMS9Z2a+vdejuL1I4bK9uB6tvSpcp72amaG9CtebvXsUlr3rUZC9"
            "XY+Kvc3MhL17FH69XY9yvT0KZ70fhVu9AABQveF6RL3D9Ti9o3AtvYXrIb1nZha9SOEKvVK4/rwVrue816PQvJqZubxdj6K8H4WL"
            "vMP1aLxI4Tq8ZDsfvBgEFrzNzAy8gZUDvGq89LvTTeK7O9/Pu6RwvbsNAqu7dJOYu90khruKbGe7XI9Cuy2yHbv8qfG6ne+nuv9l"
            "d7o+6Fm6gGo8usHsHroBbwG6g+LHuQXnjLkL1yO5Sx+6uLPvirg0gDe4BkKyt/8FAreUGlq2t6MTtQAAAAC3oxM1lBpaNv8FAjcG"
            "QrI3NIA3OLPvijhLH7o4C9cjOQXnjDmD4sc5AW8BOsHsHjqAajw6PuhZOv9ldzqd76c6/KnxOi2yHTtcj0I7imxnO90khjt0k5g7"
            "DQKrO6RwvTs73887003iO2q89DuBlQM8zcwMPBgEFjxkOx88SOE6PMP1aDwfhYs8XY+iPJqZuTzXo9A8Fa7nPFK4/jxI4Qo9Z2YW"
            "PYXrIT2jcC09w/U4PeF6RD0AAFA9H4VbPT0KZz1dj3I9exR+Pc3MhD1dj4o961GQPXsUlj0K15s9mpmhPSpcpz24Hq09SOGyPdej"
            "uD1nZr499yjEPYXryT00M9s9AAD4PWZmCj7NzBg+MzMnPpqZNT4AAEQ+ZmZSPs3MYD4zM28+mZl9PgAAhj40M40+ZmaUPpqZmz7M"
            "zKI+AACqPjMzsT5mZrg+mpm/PszMxj4AAM4+MzPVPmZm3D6ameM+zMzqPgAA8j4yM/k+MzMAP8zMAz9mZgc/AAALP5qZDj80MxI/"
            "zcwVP2ZmGT8AAB0/mpkgPzQzJD/NzCc/ZmYrPwAALz+amTI/NDM2P83MOT9mZj0/AABBP5qZRD8zM0g/zcxLP2ZmTz8AAFM/mplW"
            "PzMzWj/NzF0/ZmZhPwAAZT+amWg/MzNsP83Mbz9mZnM/AAB3P5qZej8zM34/AACAPw=="
        )),
        "weight.quant_state.bitsandbytes__nf4": ("uint8", [158], (
            "eyJxdWFudF90eXBlIjogIm5mNCIsICJibG9ja3NpemUiOiA2NCwgImR0eXBlIjogImJmbG9hdDE2IiwgInNoYXBlIjogWzgsIDY0"
            "XSwgIm5lc3RlZF9ibG9ja3NpemUiOiAyNTYsICJuZXN0ZWRfZHR5cGUiOiAiZmxvYXQzMiIsICJuZXN0ZWRfb2Zmc2V0IjogMi41"
            "MDM5MDYyNX0="
        )),
    },
    "bitsandbytes int8": {
        "weight": ("int8", [8, 64], (
            "geLv/QoXJNTh7/wJFiPT4e77CBV30+Dt+gcVdtLf7PkHaMTR3uv5BmfD0N3r+Flmws/c6vdYZcHO3OlKV2TAztDhYHGbrL3OTV9w"
            "mqu8zUxeb5mquzpLXG6Yqbo5SluFlqgnOElahJWnJjdIWYOUEyQ2R1iCkxIjNUZXgQARIjQ5iJb/DRwqOIfw/gwbKTeG7/0MGig2"
            "4O78CxknNd/t/AoYJtDe7PsJFyXP3ez6CBZ/ztzr+QcVfs3c6vgGb77M1eX2Bn+zxNTk9W5+ssPT4/RtfbHC0uJbbHywwdHhWmuf"
            "r8DQSVlqnq6/z0hYaZ2tvjZHV2icrL01RlaKm6skND5NlaSzHy49TJSjEB4tPEuTog8eLDtKkv8OHSs6g5L+DRwrOYLv/QwbKjiB"
            "7vwLGik43u37ChkoN93s+wkYJ83d7PoIFyXO3Ov5BxZ/zdvq+AYVfszb6fcGb73L2uj2BW68y9nn9l9tu8rY5vVebLrJ1+VPXWu6"
            "yNblTlyqucfVQVBfprXE00BPXqW0wzA/Tl2ks8IwPk1co7IgLz5MlKKxHy49S5OiDx4tPEuSoQ4dLDtKkf4NHCs6gZD9DBsqOYTu"
            "/QsZKDaD7fwKGSc13uz7CRgmNN3s+ggXJc7c6/kHFiTN2+r4BxV/zNrp9wYUfsva6PYFb7zK2ef2BG67ydg="
        )),
        "SCB": ("float32", [8], (
            "AOAzQADACUAA4CZAAMAQQADgIEAA4CVAAKAfQADgJEA="
        )),
        "weight_format": ("uint8", [], (
            "AA=="
        )),
    },
}
