"""The model that hgrn trains, in eager PyTorch, fp32: what torch_cpu.py times and checks.

The recurrence, per head (G = running sum of log f from the start of a chunk, C tokens a chunk,
sub-blocks of S = 16 tokens):
    A[t,s] = sum_c q[t,c] k[s,c] exp(G[t,c] - G[s,c])   s <= t
    y      = A v + (q exp(G)) h                         h: state before the chunk
    h     <- exp(G_end) h + (k exp(G_end - G))^T v
Inside a sub-block the exponents are taken from its middle: at most 8 steps away, and log f is
clamped at -10, so that exp stays finite in fp32. Between sub-blocks they are taken from a
boundary and are <= 0. Backward: dlog f = reverse running sum of q dq - k dk over the whole row.

Weights: names and shapes of tools/reference.py, projections packed (reference_names).
PyTorch 1.13 or later.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reference  # noqa: E402

S = 16          # tokens of a sub-block
MIN_LOG_F = -10.0


class ChunkedRecurrence(torch.autograd.Function):
    """q, k, v, g = log f, all (R,T,n) with R = B*H rows and T a multiple of C; returns y (R,T,n).
    States start at zero."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, C: int) -> Tensor:
        R, T, n = q.shape
        M, NS = R * T // C, C // S  # chunks, sub-blocks of a chunk
        qc, kc, vc = (a.view(M, C, n) for a in (q, k, v))
        Gs = torch.cumsum(g.view(M * NS, S, n), dim=1)     # from the start of the sub-block
        mid = Gs - Gs[:, S // 2 - 1:S // 2]
        w = torch.exp(mid)
        w_inverse = torch.exp(mid.neg_())
        qs, ks = qc.view(-1, S, n) * w, kc.view(-1, S, n) * w_inverse
        A = torch.bmm(qs, ks.transpose(1, 2)).tril_()
        G = Gs.view(M, NS, S, n)
        if NS > 1:  # shift each sub-block by what precedes it in the chunk
            ends = torch.cumsum(G[:, :, -1], dim=1)
            G = G.clone()
            G[:, 1:] += ends[:, :-1, None]
            A = ChunkedRecurrence.whole_chunk(A, qc, kc, G, M, NS, n)
        G = G.view(M, C, n)
        into = torch.exp(G)                                # start of the chunk -> t
        out = torch.exp(G[:, -1:] - G)                     # t -> end of the chunk
        kv = torch.bmm((kc * out).transpose(1, 2), vc)
        decay = into[:, -1].contiguous().view(R, -1, n, 1)
        h = ChunkedRecurrence.scan(decay, kv.view(R, -1, n, n)).view(M, n, n)
        y = torch.bmm(A, vc).baddbmm_(qc * into, h)
        ctx.save_for_backward(q, k, v, w, w_inverse, G, into, out, A, h)
        ctx.C = C
        return y.view(R, T, n)

    @staticmethod
    def whole_chunk(diagonal: Tensor, q: Tensor, k: Tensor, G: Tensor, M: int, NS: int,
                    n: int) -> Tensor:
        """(M*NS,S,S) diagonal blocks -> (M,C,C) with the blocks below them."""
        A = q.new_zeros(M, NS, S, NS, S)
        diagonal = diagonal.view(M, NS, S, S)
        for b in range(NS):
            A[:, b, :, b] = diagonal[:, b]
            if b > 0:
                qb, kb, _, _ = ChunkedRecurrence.boundary(q, k, G, b)
                A[:, b, :, :b] = torch.bmm(qb, kb.transpose(1, 2)).view(M, S, b, S)
        return A.view(M, NS * S, NS * S)

    @staticmethod
    def boundary(q: Tensor, k: Tensor, G: Tensor, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sub-block b's queries and all earlier keys, weighted from the end of sub-block b-1."""
        G = G.view(q.shape)
        edge = G[:, b * S - 1:b * S]
        wq = torch.exp(G[:, b * S:(b + 1) * S] - edge)
        wk = torch.exp(edge - G[:, :b * S])
        return q[:, b * S:(b + 1) * S] * wq, k[:, :b * S] * wk, wq, wk

    @staticmethod
    def scan(decay: Tensor, kv: Tensor) -> Tensor:
        """States before each chunk: decay (R,NC,n,1), kv (R,NC,n,n) -> (R,NC,n,n)."""
        h = torch.empty_like(kv)
        h[:, 0] = 0
        for c in range(1, kv.shape[1]):
            torch.addcmul(kv[:, c - 1], h[:, c - 1], decay[:, c - 1], out=h[:, c])
        return h

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, w, w_inverse, G, into, out, A, h = ctx.saved_tensors
        R, T, n = q.shape
        C = ctx.C
        M, NS = R * T // C, C // S
        qc, kc, vc = (a.view(M, C, n) for a in (q, k, v))
        dy = dy.contiguous().view(M, C, n)
        # gradient of the state after each chunk: the same scan, from the right
        dkv_in = torch.bmm((qc * into).transpose(1, 2), dy).view(R, -1, n, n)
        decay = into[:, -1].view(R, -1, n, 1)
        dh = torch.empty_like(dkv_in)
        dh[:, -1] = 0
        for c in range(dh.shape[1] - 2, -1, -1):
            torch.addcmul(dkv_in[:, c + 1], dh[:, c + 1], decay[:, c + 1], out=dh[:, c])
        dh = dh.view(M, n, n)

        dA = torch.bmm(dy, vc.transpose(1, 2)).tril_()
        dv = torch.bmm(A.transpose(1, 2), dy).baddbmm_(kc * out, dh)
        dq = torch.bmm(dy, h.transpose(1, 2)).mul_(into)
        dk = torch.bmm(vc, dh.transpose(1, 2)).mul_(out)
        if NS == 1:
            diagonal = dA
        else:
            blocks = dA.view(M, NS, S, NS, S)
            diagonal = torch.stack([blocks[:, b, :, b] for b in range(NS)], 1).view(-1, S, S)
            for b in range(1, NS):
                qb, kb, wq, wk = ChunkedRecurrence.boundary(qc, kc, G, b)
                d = dA[:, b * S:(b + 1) * S, :b * S]
                dq[:, b * S:(b + 1) * S] += torch.bmm(d, kb).mul_(wq)
                dk[:, :b * S] += torch.bmm(d.transpose(1, 2), qb).mul_(wk)
        qs, ks = qc.view(-1, S, n), kc.view(-1, S, n)
        dq.view(-1, S, n).addcmul_(torch.bmm(diagonal, ks * w_inverse), w)
        dk.view(-1, S, n).addcmul_(torch.bmm(diagonal.transpose(1, 2), qs * w), w_inverse)
        dq, dk, dv = (a.view(R, T, n) for a in (dq, dk, dv))
        # sum over s >= t of e[s] = total - prefix + e[t]
        e = (q * dq).addcmul_(k, dk, value=-1)
        prefix = torch.cumsum(e, dim=1)
        dg = (prefix[:, -1:] - prefix).add_(e)
        return dq, dk, dv, dg, None


def plain_recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, C: int) -> Tensor:
    """As ChunkedRecurrence, by autograd. The decay between any two tokens of a chunk is a tensor of
    its own (R,C,C,n), so that no exponent is above 0."""
    R, T, n = q.shape
    future = torch.ones(C, C, dtype=torch.bool).triu(1)[:, :, None]
    h = q.new_zeros(R, n, n)
    out = []
    for s in range(0, T, C):
        qc, kc, vc = (a[:, s:s + C] for a in (q, k, v))
        G = torch.cumsum(g[:, s:s + C], dim=1)
        decay = (G[:, :, None] - G[:, None]).masked_fill(future, -torch.inf).exp()
        A = (qc[:, :, None] * kc[:, None] * decay).sum(-1)
        out.append(A @ vc + (qc * G.exp()) @ h)
        end = G[:, -1:]
        h = end.exp().transpose(1, 2) * h + (kc * (end - G).exp()).transpose(1, 2) @ vc
    return torch.cat(out, dim=1)


RECURRENCES = {"tuned": ChunkedRecurrence.apply, "plain": plain_recurrence}


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = torch.rsqrt(norm * norm / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, r = ctx.saved_tensors
        x_hat = x * r
        d = dy * weight
        mean = (d * x_hat).mean(-1, keepdim=True)
        dweight = (dy * x_hat).sum(tuple(range(dy.dim() - 1)))
        return d.sub_(x_hat.mul_(mean)).mul_(r), dweight, None


class RMSNorm(nn.Module):
    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


ACTIVATIONS = {"none": lambda z: z, "silu": F.silu, "swish": F.silu, "sigmoid": torch.sigmoid}


class Mixer(nn.Module):
    recurrence = staticmethod(ChunkedRecurrence.apply)  # --recurrence

    def __init__(self, c: reference.Config, bias: bool, make_norm):
        super().__init__()
        D = c.hidden_size
        self.c = c
        self.qfi_proj = nn.Linear(D, 3 * D, bias=bias)
        self.g_norm = make_norm(1e-5)
        self.o_proj = nn.Linear(D, D, bias=bias)
        self.scale = c.expand_ratio ** -0.5 if c.query_scale == "rsqrt" else 1.0

    def forward(self, u: Tensor, beta: Tensor, C: int) -> Tensor:
        B, T, D = u.shape
        n = self.c.expand_ratio
        H = D // n
        x = self.qfi_proj(u)
        pad = -T % C
        if pad:
            x = F.pad(x, (0, 0, 0, pad))  # later tokens: they change nothing before them
        x = x.view(B, T + pad, 3, H, n).permute(2, 0, 3, 1, 4).contiguous()
        o, z, i = x.unbind(0)                                          # (B,H,T,n)
        o = ACTIVATIONS[self.c.output_activation](o) * self.scale
        i = ACTIVATIONS[self.c.input_activation](i)
        rest = 1 - beta.view(H, 1, n)
        f = torch.addcmul(beta.view(H, 1, n), rest, torch.sigmoid(z))
        k = rest * torch.sigmoid(-z)
        g = torch.log(f).clamp(min=MIN_LOG_F)
        o, k, i, g = (a.reshape(B * H, T + pad, n) for a in (o, k, i, g))
        y = self.recurrence(o, k, i, g, C)
        y = y.view(B, H, T + pad, n)[:, :, :T].transpose(1, 2).reshape(B, T, D)
        return self.o_proj(self.g_norm(y))


class Block(nn.Module):
    def __init__(self, c: reference.Config, bias: bool, make_norm):
        super().__init__()
        D, width = c.hidden_size, c.intermediate_size
        self.attn_norm = make_norm(c.norm_eps)
        self.attn = Mixer(c, bias, make_norm)
        self.mlp_norm = make_norm(c.norm_eps)
        self.gate_up_proj = nn.Linear(D, 2 * width, bias=bias)
        self.down_proj = nn.Linear(width, D, bias=bias)
        self.act = ACTIVATIONS[c.hidden_act]
        self.dropout = c.dropout

    def forward(self, x: Tensor, beta: Tensor, C: int) -> Tensor:
        x = x + self.drop(self.attn(self.attn_norm(x), beta, C))
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.drop(self.down_proj(self.act(gate) * up))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout > 0 else x


class Model(nn.Module):
    def __init__(self, c: reference.Config, bias: bool):
        super().__init__()
        self.c = c
        D = c.hidden_size
        norms = {"rmsnorm": lambda eps: RMSNorm(D, eps),
                 "layernorm": lambda eps: nn.LayerNorm(D, eps)}
        self.embeddings = nn.Embedding(c.vocab_size, D)
        self.lower_bounds = nn.Parameter(torch.zeros(c.num_hidden_layers, D))
        self.layers = nn.ModuleList(Block(c, bias, norms[c.norm])
                                    for _ in range(c.num_hidden_layers))
        self.norm = norms[c.norm](c.norm_eps)
        self.lm_head = None if c.tie_word_embeddings else nn.Linear(D, c.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor, C: int) -> Tensor:
        """The mean loss; C: tokens a chunk."""
        x = self.embeddings(tokens)
        if self.c.scale_embedding:
            x = x * self.c.hidden_size ** 0.5
        if self.c.dropout > 0:
            x = F.dropout(x, self.c.dropout)
        s = torch.softmax(self.lower_bounds, dim=0)
        beta = torch.cumsum(s, dim=0) - s[0] if self.c.use_lower_bound else torch.zeros_like(s)
        for layer, block in enumerate(self.layers):
            x = block(x, beta[layer], C)
        head = self.embeddings.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(self.norm(x), head)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def reference_names(self) -> dict[str, list[str]]:
        """Parameter -> the reference's names of the tensors packed in it, in order."""
        packed = {"qfi_proj": ["q_proj", "f_proj", "i_proj"],
                  "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"], "down_proj": ["mlp.down_proj"]}
        names = {}
        for name, _ in self.named_parameters():
            full = name if name.startswith("lm_head") else "model." + name
            parts = [full]
            for ours, theirs in packed.items():
                if f".{ours}." in full:
                    parts = [full.replace(f".{ours}.", f".{t}.") for t in theirs]
            names[name] = parts
        return names

    def initialize(self, initializer: str, std: float, seed: int) -> None:
        torch.manual_seed(seed)
        D = self.c.hidden_size
        for name, p in self.named_parameters():
            if initializer == "normal" and p.dim() == 2 and name != "lower_bounds":
                nn.init.normal_(p, std=std)
        if initializer == "fairseq":  # linear layers keep PyTorch's own
            nn.init.normal_(self.embeddings.weight, std=D ** -0.5)
            nn.init.ones_(self.lower_bounds)
