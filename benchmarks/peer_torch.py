"""The torch contenders: `generate` of transformers, TRL's RLOO and GRPO trainers, and a plain GPT in torch.

    build/peers/torch/bin/python benchmarks/peer_torch.py '{"task": "generate", "shape": "A", "dtype": "float32"}'

Each has the settings that were measured to be best here, on two cores of an AMD EPYC.
"""

import contextlib
import math
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

# glibc reads its settings before Python begins, so that a process without them starts itself again. Memory that is
# freed is kept, and not given back and faulted in again: a step of RLOO on A takes 0.73 of the time, an update of
# pretraining on B 0.88, generation on A 0.96. OpenMP keeps its own policy of waiting, which spins for a moment before
# it sleeps: with OMP_WAIT_POLICY=passive a step of RLOO on A takes about 1.1 times as long, generation about 1.2 times.
SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_ARENA_MAX": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
STRAY = "OMP_WAIT_POLICY"
if __name__ == "__main__" and (STRAY in os.environ or not SETTINGS.items() <= os.environ.items()):
    os.environ.pop(STRAY, None)
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)

import datasets  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from benchmarks.work import (  # noqa: E402
    EOS,
    FIXED,
    FIXED_G,
    SHAPES,
    SPREAD,
    Shape,
    Work,
    random_prompts,
    random_windows,
)
from benchmarks.worker import Job, serve  # noqa: E402

THREADS = 2


def work_of(shape: str, spread: bool) -> Work:
    """What the cases of a shape do."""
    return SPREAD if spread else FIXED_G if shape == "G" else FIXED


def random_gpt2(shape: Shape, spread: bool) -> transformers.GPT2LMHeadModel:
    """A GPT-2 with random weights in float32; with `spread` it ends a completion with probability 1/64 at each step.

    The output of a LayerNorm without its bias has mean zero over the features. A bias of u = (1, ..., 1)/sqrt(D) is
    therefore orthogonal to it, and a row b u of the tied embedding gets the logit b whatever the context is. The other
    logits are normal with variance .02^2 (D + 1), so that exp(b) should be (V - 1) exp(variance / 2) / 63.
    """
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    if spread:
        logit = math.log((shape.vocab_size - 1) / 63) + 0.5 * 0.02**2 * (shape.width + 1)
        with torch.no_grad():
            model.transformer.ln_f.bias.fill_(shape.width**-0.5)
            model.transformer.wte.weight[EOS].fill_(logit * shape.width**-0.5)
    return model


def generate(shape: str, dtype: str, spread: bool = False) -> Job:
    """Samples a batch of completions with transformers' `generate`."""
    size, work = SHAPES[shape], work_of(shape, spread)
    model = random_gpt2(size, spread).to(getattr(torch, dtype))
    config = transformers.GenerationConfig(
        max_new_tokens=work.length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=work.group_size,
        eos_token_id=EOS if spread else None,
        pad_token_id=EOS,
    )  # The cache is the dynamic one; the static one takes 1.06 (float32) to 1.11 (bfloat16) times as long on A.
    seeds = iter(range(10**9))

    def job() -> Mapping[str, Any]:
        prompts = torch.from_numpy(random_prompts(size, work, next(seeds))).long()
        with torch.inference_mode():
            sequences = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        lengths = completion_lengths(sequences[:, work.prompt_length :])
        if not spread:
            assert lengths == [sequences.shape[1] - work.prompt_length] * len(lengths) == [work.length] * len(lengths)
        return {"tokens": sum(lengths), "longest": max(lengths)}

    def completion_lengths(completions: Tensor) -> list[int]:
        if not spread:
            return [completions.shape[1]] * len(completions)
        ended = completions == EOS
        return torch.where(ended.any(1), ended.int().argmax(1) + 1, completions.shape[1]).tolist()

    torch.manual_seed(1)
    job(), job()
    return job


def word_tokenizer(vocab_size: int, eos: int) -> transformers.PreTrainedTokenizerFast:
    """Reads and writes token ids as decimal numbers with spaces between."""
    words = {str(token): token for token in range(vocab_size) if token != eos} | {"<eos>": eos}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


class Gate(transformers.TrainerCallback):
    """Lets the trainer begin one optimizer step for each `step`, and says when it has ended."""

    def __init__(self) -> None:
        self.begin: queue.Queue[None] = queue.Queue()
        self.end: queue.Queue[BaseException | None] = queue.Queue()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin.get()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end.put(None)

    def step(self) -> None:
        self.begin.put(None)
        if error := self.end.get():
            raise error

    def train(self, trainer: transformers.Trainer) -> None:
        try:
            trainer.train()
        except BaseException as error:  # The thread that waits in `step` has to hear of it.
            self.end.put(error)


def trainer_arguments(algorithm: str, work: Work, folder: str) -> transformers.TrainingArguments:
    """One optimizer step for each batch of completions, in float32, and nothing besides."""
    return {"rloo": trl.RLOOConfig, "grpo": trl.GRPOConfig}[algorithm](
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        # In four parts of 16 completions a step takes 0.98 of the time: within the noise.
        per_device_train_batch_size=work.prompts * work.group_size,
        gradient_accumulation_steps=1,
        num_generations=work.group_size,
        num_iterations=1,
        max_completion_length=work.length,
        max_steps=10**9,
        beta=work.kl_coefficient,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"attn_implementation": "sdpa", "dtype": "float32"},
    )


def rl_step(shape: str, algorithm: str, spread: bool = False) -> Job:
    """One optimizer step of TRL's trainer, from the prompts to the update, with transformers' `generate`."""
    size, work = SHAPES[shape], work_of(shape, spread)
    # No completion of the fixed length may end earlier: TRL cuts it at EOS, so that EOS is no token of the model.
    eos = EOS if spread else size.vocab_size
    lengths: list[int] = []
    seen: list[list[int]] = []
    scored = [0]
    generating = [0.0]

    def even_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths[:] = [len(tokens) for tokens in completion_ids]
        return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]

    def prompts() -> Iterator[Mapping[str, str]]:
        for seed in range(10**9):
            for prompt in random_prompts(size, work, seed).tolist():
                yield {"prompt": " ".join(map(str, prompt))}

    completions = work.prompts * work.group_size
    gate = Gate()
    Trainer = {"rloo": trl.RLOOTrainer, "grpo": trl.GRPOTrainer}[algorithm]
    with tempfile.TemporaryDirectory() as folder:  # Where the policy and the reference, its copy, are read from.
        random_gpt2(size, spread).save_pretrained(folder)
        trainer = Trainer(
            model=folder,
            reward_funcs=even_tokens,
            args=trainer_arguments(algorithm, work, folder),
            train_dataset=datasets.IterableDataset.from_generator(prompts),
            processing_class=word_tokenizer(size.vocab_size, eos),
            callbacks=[gate],
        )
    assert trainer.ref_model is not None and trainer.ref_model is not trainer.model
    trainer.ref_model.register_forward_hook(lambda *_: scored.__setitem__(0, scored[0] + 1))
    single_turn = trainer._generate_single_turn

    def timed_single_turn(prompt_ids: list[list[int]], *others: Any) -> Any:
        start = time.perf_counter()
        seen[:] = prompt_ids[:: work.group_size]
        answer = single_turn(prompt_ids, *others)
        generating[0] = time.perf_counter() - start
        return answer

    trainer._generate_single_turn = timed_single_turn
    threading.Thread(target=gate.train, args=(trainer,), daemon=True).start()
    seeds = iter(range(10**9))

    def job() -> Mapping[str, Any]:
        before = scored[0]
        gate.step()
        assert scored[0] > before, "the reference was not evaluated"
        assert seen == random_prompts(size, work, next(seeds)).tolist(), "these are not the prompts of this step"
        assert len(lengths) == completions and (spread or set(lengths) == {work.length}), lengths
        return {"tokens": sum(lengths), "longest": max(lengths), "generate_seconds": generating[0]}

    job(), job()
    return job


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv, self.out = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)
        self.up, self.down = nn.Linear(shape.width, 4 * shape.width), nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """As in nanoGPT: GPT-2 with a tied head and PyTorch's attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def pretrain(shape: str, dtype: str, compiled: bool = False) -> Job:
    """One update with AdamW on windows of tokens."""
    size = SHAPES[shape]
    torch.manual_seed(0)
    model = GPT(size)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=6e-4,
        betas=(0.9, 0.95),
        fused=True,  # 0.5 % from the loop over parameters: within the noise.
    )
    precision = torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    forward = torch.compile(model) if compiled else model
    seeds = iter(range(10**9))

    def job() -> Mapping[str, Any]:
        windows = torch.from_numpy(random_windows(size, next(seeds))).long()
        with precision:
            loss = forward(windows[:, :-1], windows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item())
        return {"tokens": windows[:, 1:].numel()}

    job(), job()
    return job


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    serve({"generate": generate, "rl_step": rl_step, "pretrain": pretrain})
