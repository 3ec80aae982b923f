"""The speedrun's model for Hugging Face's transformers, in one file that needs nothing else.

`./run.sh export --to hf` copies this file beside the weights; transformers loads it with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

and the model then computes what the trained one does. Every row is one document, which the
end-of-text token begins; rows may be padded on either side, with an attention mask. In decoding the
cache holds keys and values only: what a token takes from those right before it is computed again,
so that forward() is given all tokens so far, as generate() does, and not the new ones alone.

Shapes: B rows, T tokens so far, S tokens that are computed, C width, H heads, D head width, V
vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

GATE_INPUTS = 12  # gates look at this many dimensions of a token
STRIDE = 1 << 24  # more than there are tokens in a vocabulary
HIDDEN = 64  # of the functions by which tokens decide weights


class StopwatchConfig(PretrainedConfig):
    """Sizes, and the parts that a model has. Layers are counted from 0."""

    model_type = "stopwatch"

    def __init__(
        self,
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=64,
        intermediate_size=128,
        windows=(256,),  # of each layer: tokens that a query sees behind it
        attention_scale=0.125,
        rope_frequencies=(),  # radians a token; the other pairs of dimensions do not turn
        value_embed_layers=(),  # layers whose values get a second embedding of the token
        key_offset_layers=(),  # layers where half of a key is its predecessor's
        paired_layers=(),  # layers where two heads see each other's keys
        output_gate_layers=(),  # layers where each head's output has a gate
        xsa_layers=(),  # layers whose heads leave out what points along the token's own value
        qkvo_scales=False,  # whether attention's matrices have scales
        gate_by_value=False,  # whether a value embedding's gate sees that embedding
        attn_input=-1,  # a layer whose output attention sees in all layers behind it
        sublayer_lambdas=False,  # whether sublayers have weights of stream and output
        inject=False,  # whether n-grams and the first input join the stream behind attention
        mudd=(),  # two layers whose outputs are mixed into the last layer and the head
        mudd_parts=(),  # (name, layer, size, ...) of each coefficient, there and behind it
        mudd_gates=-1,  # a layer from whose input later layers' gates come; -1 are other gates
        mudd_gate_parts=(),  # the same of the gates, before that layer and from there on
        skip=(),  # two layers: the second has no attention but the first one's output
        backout=-1,  # a layer whose output is taken out of the last one's; -1 is none
        smear=False,  # whether a share of the previous token's embedding is added
        smear_first=False,  # whether that is done before the first norm
        n_gram=1,  # n-grams up to this length have embeddings
        ngram_rows=0,  # of the table for each length
        ngram_signs=False,  # whether each n-gram flips signs of its row
        norm_embedding=False,  # whether tokens' embeddings are normalised by themselves
        softcap=(),  # a, b, c: logits become a * sigmoid((z + b) / c)
        copies=0,  # lengths of n-grams whose earlier continuations are mixed in
        counts=0,  # the same of their continuations in the training text
        counts_sizes=(),  # contexts, and tokens that followed, of each of these
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.windows = list(windows)
        self.attention_scale = attention_scale
        self.rope_frequencies = list(rope_frequencies)
        self.value_embed_layers = list(value_embed_layers)
        self.key_offset_layers = list(key_offset_layers)
        self.paired_layers = list(paired_layers)
        self.output_gate_layers = list(output_gate_layers)
        self.xsa_layers = list(xsa_layers)
        self.qkvo_scales = qkvo_scales
        self.gate_by_value = gate_by_value
        self.attn_input = attn_input
        self.sublayer_lambdas = sublayer_lambdas
        self.inject = inject
        self.mudd = list(mudd)
        self.mudd_parts = [[list(part) for part in parts] for parts in mudd_parts]
        self.mudd_gates = mudd_gates
        self.mudd_gate_parts = [[list(part) for part in parts] for parts in mudd_gate_parts]
        self.skip = list(skip)
        self.backout = backout
        self.smear = smear
        self.smear_first = smear_first
        self.n_gram = n_gram
        self.ngram_rows = ngram_rows
        self.ngram_signs = ngram_signs
        self.norm_embedding = norm_embedding
        self.softcap = list(softcap)
        self.copies = copies
        self.counts = counts
        self.counts_sizes = list(counts_sizes)
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


# --------------------------------------------------------------------------------------------------
# Weights, under the names that they have in the file


class Attention(nn.Module):
    """The weights of one layer's attention."""

    def __init__(self, c, layer):
        super().__init__()
        C = c.hidden_size
        H = c.num_attention_heads
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)
        if layer in c.output_gate_layers and c.mudd_gates < 0:
            self.output_gate = nn.Linear(GATE_INPUTS, H, bias=False)
        if layer in c.value_embed_layers:
            self.value_embed = nn.Embedding(c.vocab_size, C)
            if c.mudd and layer == c.num_hidden_layers - 1:
                return  # it has another gate
            self.value_gate = nn.Linear(GATE_INPUTS, H, bias=False)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu().square())


class Layer(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        if layer not in c.skip[1:]:
            self.self_attn = Attention(c, layer)
        self.mlp = MLP(c)


class Tables(nn.Module):
    """Tokens' embeddings, and the layers."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([Layer(c, i) for i in range(c.num_hidden_layers)])


# --------------------------------------------------------------------------------------------------
# The model


class StopwatchForCausalLM(PreTrainedModel, GenerationMixin):
    """The transformer and its head."""

    config_class = StopwatchConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    # Small numbers that are fp32 whatever the rest is
    _keep_in_fp32_modules_strict = [
        "lambdas",
        "residual_lambdas",
        "post_lambdas",
        "inject_lambdas",
        "mudd_in",
        "mudd_out",
        "mudd_gate_in",
        "mudd_gate_out",
        "mudd_gate_scale",
        "scalars",
        "smear_gate",
        "qkvo_scales",
        "xsa_strengths",
        "mix_gates",
        "mix_counts",
        "output_gate",
        "value_gate",
    ]

    def __init__(self, config):
        super().__init__(config)
        c = config
        C = c.hidden_size
        self.model = Tables(c)
        self.lm_head = nn.Linear(C, c.vocab_size, bias=False)
        self.add_weights()
        self.scalars = nn.Parameter(torch.zeros(3))  # weights of smear, skip and backout
        if c.qkvo_scales:
            self.qkvo_scales = nn.Parameter(torch.zeros(len(self.attention_layers()), 2))
        if c.xsa_layers and c.mudd_gates < 0:
            n = len(c.xsa_layers)
            self.xsa_strengths = nn.Parameter(torch.zeros(n, c.num_attention_heads))
        if c.smear:
            self.smear_gate = nn.Parameter(torch.zeros(1, GATE_INPUTS))
        if c.n_gram > 1:
            self.ngram_embeds = nn.Parameter(torch.zeros(c.n_gram - 1, c.ngram_rows, C))
        n = c.copies + c.counts
        if n:
            told = 2 * n + (c.copies > 0) + (c.counts > 0)
            self.mix_gates = nn.Parameter(torch.zeros(n + 1, C))
            self.mix_counts = nn.Parameter(torch.zeros(n + 1, told))
        if c.counts:
            self.counts = nn.ModuleList([Followers(*sizes) for sizes in c.counts_sizes])
        # Version 4 takes no names of parts that a model does not have
        there = {part for name, _ in self.named_parameters() for part in name.split(".")}
        strict = self._keep_in_fp32_modules_strict
        self._keep_in_fp32_modules_strict = [name for name in strict if name in there]
        self.post_init()

    def add_weights(self):
        """Those of the stream and of what joins it; as numbers, or as functions of the token."""
        c = self.config
        L = c.num_hidden_layers
        C = c.hidden_size
        if not c.sublayer_lambdas:
            self.lambdas = nn.Parameter(torch.zeros(L, 2))
            return
        self.residual_lambdas = nn.Parameter(torch.zeros(L, 2))
        self.post_lambdas = nn.Parameter(torch.zeros(L, 2))
        if c.mudd_gates < 0:
            columns = 2 if c.inject and c.n_gram > 1 else 1
            self.inject_lambdas = nn.Parameter(torch.zeros(len(self.inject_layers()), columns))
        else:
            self.mudd_gate_in = nn.Parameter(torch.zeros(2, HIDDEN, C))
            self.mudd_gate_out = nn.Parameter(torch.zeros(size(c.mudd_gate_parts), HIDDEN + 1))
            self.mudd_gate_scale = nn.Parameter(torch.zeros(2, 1))
        if c.mudd:
            self.mudd_in = nn.Parameter(torch.zeros(2, HIDDEN, C))
            self.mudd_out = nn.Parameter(torch.zeros(size(c.mudd_parts), HIDDEN + 1))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=None, **kwargs
    ):
        """All tokens, also where a cache has most of them."""
        return dict(
            input_ids=input_ids.contiguous(),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
        )

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        return_dict=True,
        **kwargs,
    ):
        """Logits of what follows each token, or log probabilities where copies or counts are
        mixed in.

        input_ids: (B, T) int64, all tokens so far; attention_mask: (B, T), 0 for padding;
        past_key_values: a DynamicCache that holds the first P < T of them, whose logits are not
        computed again; labels: (B, T), -100 for none: the loss is the mean over those that follow
        a token; logits_to_keep: of the last so many tokens only, 0 for all. The logits are
        (B, T - P, V) in fp32.
        """
        c = self.config
        T = input_ids.size(1)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0
        if past_key_values is not None:
            turns = 2 if self.attention_layers()[0] in c.paired_layers else 1
            past = past_key_values.get_seq_length() // turns
        if T <= past:
            raise ValueError(
                f"input_ids has {T} tokens where the cache holds {past}: expected all tokens so "
                "far, not only the new ones"
            )
        first = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        if attention_mask is not None:
            first = attention_mask.long().argmax(dim=1)  # (B,): where each row's document begins

        x = self.hidden(input_ids, first, past, past_key_values)
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = F.linear(x, self.lm_head.weight).float()
        if c.softcap:
            scale, shift, width = c.softcap
            logits = scale * torch.sigmoid((logits + shift) / width)
        if c.copies or c.counts:
            logits = self.mix_in(x, logits, input_ids, first)

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def attention_layers(self):
        return [i for i in range(self.config.num_hidden_layers) if i not in self.config.skip[1:]]

    def inject_layers(self):
        """Layers whose weights of the first input and of n-grams are not MUDD's."""
        last = self.config.num_hidden_layers - 1
        return [i for i in self.attention_layers() if not (self.config.mudd and i == last)]

    def hidden(self, tokens, first, past, cache):
        """(B, T) int64 -> (B, T - past, C) ready for the head."""
        c = self.config
        # A key's half comes from the token before it, which is computed again for that
        begin = past - 1 if past and c.key_offset_layers else past
        positions = torch.arange(begin, tokens.size(1), device=tokens.device) - first[:, None]
        smear, skip, backout = self.scalars.unbind(0)
        x, ngrams = self.embed(tokens, first, begin, smear)
        tokens = tokens[:, begin:]
        x0 = x
        gates = self.gates_of(x0, 0)
        if c.inject and ngrams is not None:
            x = x + self.weights(0, gates)["ngrams"] * ngrams
        start = x  # what the residual stream begins with
        outputs = []  # of each layer
        n_attention = 0
        for i, layer in enumerate(self.model.layers):
            if i == c.mudd_gates:
                gates |= self.gates_of(x, 1)
            w = self.weights(i, gates)
            first_input = x0
            mudd = c.mudd and i == c.num_hidden_layers - 1
            if mudd:
                last = x
                first_input = start
                w |= self.mudd_of(x, 0)[i]
                late = outputs[c.mudd[1]]
            # What the stream began with comes again: before attention, or behind it
            if not c.sublayer_lambdas:
                x = w["stream"] * x + w["x0"] * x0
            elif not c.inject and i not in c.skip[1:]:
                x = x + w["x0"] * x0

            if i in c.skip[1:]:
                weight = skip.sigmoid() * w["skip"] if "skip" in w else skip
                x = x + weight * outputs[c.skip[0]]
            else:
                h = norm(outputs[c.attn_input] if 0 <= c.attn_input < i else x)
                more = self.second_values(i, layer.self_attn, h, tokens, w)
                if mudd:  # earlier streams join the values, and then the stream
                    streams = w["values_x0"] * start + w["values_late"] * late
                    more = more + streams + w["values_x"] * x
                    x = (1 + w["mix_x"]) * x + w["mix_x0"] * start + w["mix_late"] * late
                keep = Keep(cache, n_attention, past - begin)
                y = self.attend(i, layer.self_attn, h, more, positions, keep, w)
                if c.sublayer_lambdas:
                    x = w["stream"] * x
                    y = w["attn"] * y
                x = x + y
                if c.inject:
                    x = x + w["x0"] * first_input
                    if i and ngrams is not None:
                        x = x + w["ngrams"] * ngrams
                n_attention += 1
            y = layer.mlp(norm(x))
            if c.sublayer_lambdas:
                x = w["mlp_stream"] * x
                y = w["mlp"] * y
            x = x + y
            outputs.append(x)
        if c.backout >= 0:
            x = x + backout * outputs[c.backout]
        if c.mudd:
            early, late = c.mudd
            sources = dict(x0=start, late=outputs[late], early=outputs[early], last=last)
            if c.value_embed_layers:
                layer = self.model.layers[c.value_embed_layers[0]]
                sources["value"] = layer.self_attn.value_embed(tokens)
            for name, weight in self.mudd_of(x, 1)[c.num_hidden_layers].items():
                x = x + weight * sources[name]
        return norm(x)[:, past - begin :]

    # ----------------------------------------------------------------------------------------------
    # Weights of what is added up

    def weights(self, i, gates):
        """{what it weighs: a number, or (B, S, n) by the token} of layer i."""
        c = self.config
        if not c.sublayer_lambdas:
            stream, x0 = self.lambdas[i]
            return dict(stream=stream, x0=x0)
        stream, mlp_stream = self.residual_lambdas[i]
        attn, mlp = self.post_lambdas[i]
        w = dict(stream=stream, attn=attn, mlp_stream=mlp_stream, mlp=mlp)
        layers = self.inject_layers()
        if c.mudd_gates < 0 and i in layers:
            w |= zip(("x0", "ngrams"), self.inject_lambdas[layers.index(i)])
        return w | gates.get(i, {})

    def gates_of(self, x, half):
        """{layer: {name: (B, S, n)}} of the gates that x (B, S, C) decides."""
        c = self.config
        if c.mudd_gates < 0:
            return {}
        w_in, scale = self.mudd_gate_in[half], self.mudd_gate_scale[half]
        return coefficients(x, w_in, self.mudd_gate_out, scale, c.mudd_gate_parts, half)

    def mudd_of(self, x, place):
        """The same of what the last layer (0) mixes in, and the head (1)."""
        parts = self.config.mudd_parts
        return coefficients(x, self.mudd_in[place], self.mudd_out, 0.1, parts, place)

    # ----------------------------------------------------------------------------------------------
    # Embeddings

    def embed(self, tokens, first, begin, smear):
        """(B, T) int64 -> (B, T - begin, C) twice: tokens with a share of the token before, and
        n-grams, None where there are none or where they are part of the tokens' embeddings."""
        c = self.config
        # Those that n-grams and the smear look back at come along
        start = max(begin - c.n_gram, 0)
        tokens = tokens[:, start:]
        at = torch.arange(start, start + tokens.size(1), device=tokens.device)
        begins = at <= first[:, None]  # (B, T - start): a document, or the padding before it
        x = self.model.embed_tokens(tokens)
        if c.smear_first:
            x = self.smeared(x, begins, smear)
        if c.norm_embedding:
            x = norm(x)
        ngrams = self.embed_ngrams(tokens, begins) if c.n_gram > 1 else None
        if ngrams is not None and not c.inject:
            x = x + ngrams
            ngrams = None
        x = norm(x)
        if not c.smear_first:
            x = self.smeared(x, begins, smear)
        new = begin - start
        return x[:, new:], ngrams if ngrams is None else ngrams[:, new:]

    def smeared(self, x, begins, smear):
        """(B, T, C) with a gated share of the token before."""
        if not self.config.smear:
            return x
        share = smear * gate(x, self.smear_gate)  # (B, T, 1)
        if self.config.smear_first:
            share = share / 2  # from 0 to 1
        return x + share * one_before(x, begins, 0.0)

    def embed_ngrams(self, tokens, begins):
        """Sum of the embeddings of the 2-gram, 3-gram, ... that end at each token: (B, T, C)."""
        key = before = tokens
        signs = self.signs()
        total = 0
        for table in self.ngram_embeds.unbind(0):
            before = one_before(before, begins, 0)
            # An odd factor, so that rows of a power of two still depend on all tokens
            key = key * (self.config.vocab_size | 1) + before
            x = F.embedding(key % len(table), table)
            if signs is not None:
                x = x * F.embedding(key // len(table) % len(signs), signs)
            total = total + x
        return total

    def signs(self):
        """(1024, C) of 1 and -1, by which n-grams that share a row differ; None without."""
        if not self.config.ngram_signs:
            return None
        if getattr(self, "_signs", None) is None:
            g = torch.Generator().manual_seed(0)
            bits = torch.randint(2, (1024, self.config.hidden_size), generator=g, device="cpu")
            self._signs = (2 * bits - 1).to(self.ngram_embeds)
        return self._signs.to(self.ngram_embeds)

    # ----------------------------------------------------------------------------------------------
    # Attention

    def second_values(self, i, layer, h, tokens, w):
        """(B, S, C): the tokens' second embeddings by their gates, or 0."""
        c = self.config
        if i not in c.value_embed_layers:
            return torch.zeros_like(h)
        second = layer.value_embed(tokens)
        if "value_gate" in w:
            n = w["value_gate"].size(-1)
            share = w["value_gate"].repeat_interleave(c.num_attention_heads // n, dim=-1)
        else:
            seen = h
            if c.gate_by_value:
                half = GATE_INPUTS // 2
                seen = torch.cat([h[..., :half], second[..., :half]], dim=-1)
            share = gate(seen, layer.value_gate.weight)
        return (share[..., None] * second.unflatten(2, (-1, c.head_dim))).flatten(2)

    def attend(self, i, layer, h, more_values, positions, keep, w):
        """Attention of layer i: h (B, S, C), normalised; more_values: (B, S, C); w: the layer's
        weights -> (B, S, C)."""
        c = self.config
        B, S, C = h.shape
        H = c.num_attention_heads
        D = c.head_dim
        # In a layer of pairs, heads h and h + H / 2 take turns in time
        n = 2 if i in c.paired_layers else 1
        of_qkv = of_o = 1
        if c.qkvo_scales:
            of_qkv, of_o = self.qkvo_scales[self.attention_layers().index(i)].to(h.dtype)
        q = (of_qkv * layer.q_proj(h)).view(B, n * S, H // n, D)
        k = (of_qkv * layer.k_proj(h)).view(B, n * S, H // n, D)
        v = (of_qkv * layer.v_proj(h)).view(B, S, H, D)
        turns = n * positions[:, :, None] + torch.arange(n, device=h.device)
        turns = turns.flatten(1)  # (B, n S)
        cos, sin = self.angles(turns, q)
        q = rotate(norm(q), cos, sin)
        k = rotate(norm(k), cos, sin)

        if i in c.key_offset_layers:
            still = torch.arange(D, device=h.device) % (D // 2) >= D // 4
            own = turns[:, :, None, None] <= 0  # a document's first token
            k = torch.where(still & ~own, k.roll(1, dims=1), k)
        v = v + more_values.view(B, S, H, D)
        own = v
        v = v.reshape(B, n * S, H // n, D)

        k, v = keep.all(k.transpose(1, 2), v.transpose(1, 2), n)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k,
            v,
            attn_mask=self.mask(turns, n, k.size(2), n * c.windows[i]),
            scale=c.attention_scale,
        )
        y = y.transpose(1, 2).reshape(B, S, H, D)
        if i in c.xsa_layers:
            if "xsa" in w:
                strength = w["xsa"]
            else:
                strength = self.xsa_strengths[c.xsa_layers.index(i)]
            along = (y * own).sum(-1) / own.square().sum(-1).clamp(min=1e-8)  # (B, S, H)
            y = y - (strength.tanh().to(y.dtype) * along)[..., None] * own
        if "out" in w:
            y = w["out"][..., None] * y
        elif i in c.output_gate_layers:
            y = gate(h, layer.output_gate.weight)[..., None] * y
        return of_o * layer.o_proj(y.reshape(B, S, C))

    def mask(self, turns, n, n_keys, window):
        """(B, 1, n S, n_keys) bool: which keys each query sees."""
        # The last query and the last key are the same token's: so keys are counted from there
        keys = torch.arange(n_keys, device=turns.device) - n_keys + 1 + turns[:, -1:]
        query = turns[:, :, None]
        key = keys[:, None, :]
        seen = (key <= query) & (key >= query - window) & (key >= 0)
        seen = seen | (key == query)  # padding sees itself, so that it is a number
        return seen[:, None]

    def angles(self, turns, like):
        """cos and sin, (B, n S, 1, D / 2) each."""
        freqs = torch.zeros(self.config.head_dim // 2, device=turns.device)
        given = self.config.rope_frequencies
        freqs[: len(given)] = torch.tensor(given, device=turns.device)
        angles = turns[:, :, None, None] * freqs
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    # ----------------------------------------------------------------------------------------------
    # What followed the last tokens before, earlier in the same document and in the training text

    def mix_in(self, x, logits, tokens, first):
        """Log probabilities (B, S, V) of the head's distribution, mixed with how often each token
        followed the last 0, 1, ... tokens before.

        x: (B, S, C), logits: (B, S, V) of the last S tokens; tokens: (B, T); first: (B,).
        """
        told, there, probs = [], [], []  # for gates (B, S, n); (B, S) and (B, S, V) of each length
        one = torch.ones(*x.shape[:2], 1, device=x.device)
        if self.config.copies:
            hits = self.what_followed(tokens, first, x.size(1))  # (B, S, V, copies)
            seen = hits.sum(2)  # (B, S, copies)
            told += [seen.log1p(), (seen > 0).float(), one]
            there += (seen > 0).unbind(-1)
            probs += (hits / seen.clamp(min=1)[:, :, None]).unbind(-1)
        if self.config.counts:
            seen, kinds, found = self.what_follows(tokens, first, x.size(1))
            told += [seen.log1p(), kinds.log1p(), one]
            there += (seen > 0).unbind(-1)
            probs += found
        # Gates: by the token, and by how often each context was there
        about = torch.cat(told, dim=-1)
        by_token = F.linear(x.to(self.mix_gates.dtype), self.mix_gates)
        gates = by_token + F.linear(about.to(self.mix_counts.dtype), self.mix_counts)
        # The model itself always has something to say
        none = F.pad(~torch.stack(there, dim=-1), (1, 0))
        share = gates.masked_fill(none, -torch.inf).log_softmax(-1).to(logits.dtype)

        mixed = share[..., :1] + logits.log_softmax(-1)
        for n, p in enumerate(probs, 1):
            mixed = torch.logaddexp(mixed, share[..., n : n + 1] + p.log())
        return mixed

    def what_follows(self, tokens, first, n_last):
        """In the training text, for the last n_last tokens of each row: how often each context was
        there and how many kinds of tokens followed it, (B, S, counts) fp32 each, and smoothed
        probabilities, (B, S, V) of each length."""
        at = torch.arange(tokens.size(1), device=tokens.device)
        so_far = at - first[:, None] + 1  # tokens of the document
        place = torch.zeros_like(tokens)  # of the context, -1 where it never was
        all_seen, all_kinds, probs = [], [], []
        for n, followers in enumerate(self.counts):
            seen, kinds, hits = followers(place[:, -n_last:], self.config.vocab_size)
            p = hits
            if probs:
                p = (hits - 0.75).clamp(min=0) + 0.75 * kinds[..., None] * probs[-1]
            p = p / seen.clamp(min=1)[..., None]
            all_seen.append(seen)
            all_kinds.append(kinds)
            probs.append(p)
            # The context with one token more: what follows a context is one itself
            before = place.roll(1, dims=1) if n else place
            place = followers.find(before, tokens).where(so_far > n, -1)
        return torch.stack(all_seen, dim=-1), torch.stack(all_kinds, dim=-1), probs

    def what_followed(self, tokens, first, n_last):
        """(B, n_last, V, copies) fp32 counts, for the last n_last tokens of each row."""
        B, T = tokens.shape
        at = torch.arange(T - n_last, T, device=tokens.device)[:, None]  # (S, 1)
        earlier = torch.arange(T - 1, device=tokens.device)  # whose next token is counted
        begin = first[:, None, None]
        same = (earlier < at) & (earlier >= begin)  # (B, S, T - 1): contexts that agree
        followed = tokens[:, None, 1:].expand(B, n_last, T - 1)
        counts = []
        for length in range(self.config.copies):
            if length:
                # One token more has to agree, that so far back
                back = length - 1
                there = tokens.roll(back, dims=1)[:, None, : T - 1]
                here = tokens[:, (at[:, 0] - back).clamp(min=0), None]
                same = same & (there == here) & (earlier - back >= begin)
            hits = torch.zeros(B, n_last, self.config.vocab_size, device=tokens.device)
            counts.append(hits.scatter_add_(2, followed, same.float()))
        return torch.stack(counts, dim=-1)


class Followers(nn.Module):
    """Contexts of one length in the training text, and what followed each of them."""

    def __init__(self, n_contexts, n_followers):
        super().__init__()

        def numbers(name, n):
            self.register_buffer(name, torch.zeros(n, dtype=torch.int32))

        numbers("first", n_contexts + 1)  # where the followers of each context begin
        numbers("follower", n_followers)
        numbers("count", n_followers)

    def find(self, place, token):
        """Which of the followers of its context each token is, -1 for none; (B, T) int64 each."""
        which = torch.arange(len(self.first) - 1, device=self.first.device)
        pairs = which.repeat_interleave(self.first.diff()) * STRIDE + self.follower
        pair = place * STRIDE + token
        at = torch.searchsorted(pairs, pair).clamp(max=len(pairs) - 1)
        return at.where(pairs[at] == pair, -1)

    def forward(self, place, n_vocab):
        """place: (B, S) int64, of contexts, -1 for none -> how often each was there and how many
        kinds followed, (B, S) fp32 each, and hits (B, S, V) fp32."""
        begin = self.first[place].long()
        kinds = (self.first[place.clamp(min=0) + 1] - begin).where(place >= 0, 0)
        # Followers of all places, one after the other
        row = torch.arange(place.numel(), device=place.device).repeat_interleave(kinds.flatten())
        before = kinds.flatten().cumsum(0) - kinds.flatten()
        at = torch.arange(len(row), device=place.device) - before[row] + begin.flatten()[row]
        hits = torch.zeros(place.numel(), n_vocab, device=place.device)
        hits[row, self.follower[at].long()] = self.count[at].float()
        hits = hits.view(*place.shape, n_vocab)
        return hits.sum(-1), kinds.float(), hits


class Keep:
    """The keys and values of one layer in a cache, if there is one.

    number: of the layer among those with attention; known: how many of the tokens that are computed
    the cache holds already.
    """

    def __init__(self, cache, number, known):
        self.cache = cache
        self.number = number
        self.known = known

    def all(self, k, v, n):
        """(B, H / n, n S, D) each -> those of all tokens; n: turns that each token takes."""
        if self.cache is None:
            return k, v
        new = n * self.known
        return self.cache.update(k[:, :, new:], v[:, :, new:], self.number)


def size(lists):
    """How many coefficients these lists of parts have."""
    return sum(part[2] for parts in lists for part in parts)


def coefficients(x, w_in, w_out, scale, lists, which):
    """{layer: {name: (B, S, n)}}: scale (W2 gelu(W1 x) + b) for one of the lists of parts.

    x: (B, S, C); w_in: W1; w_out: W2 of all lists, and b as its last column.
    """
    w_out = w_out.split([size([parts]) for parts in lists])[which]
    hidden = F.gelu(F.linear(x, w_in.to(x.dtype)))
    out = F.linear(hidden, w_out[:, :-1].to(x.dtype))
    out = (scale * (out + w_out[:, -1])).to(x.dtype)
    found = {}
    pieces = out.split([part[2] for part in lists[which]], dim=-1)
    for (name, layer, *_), piece in zip(lists[which], pieces):
        found.setdefault(layer, {})[name] = piece
    return found


def norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def gate(x, w):
    """x: (..., C), w: (H, GATE_INPUTS) -> (..., H) between 0 and 2."""
    return 2 * torch.sigmoid(F.linear(x[..., :GATE_INPUTS], w.to(x.dtype)))


def rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def one_before(x, begins, value):
    """(B, T, ...) -> the value one token earlier; `value` where documents begin."""
    begins = begins.view(*begins.shape, *[1] * (x.dim() - 2))
    return x.roll(1, dims=1).masked_fill(begins, value)
