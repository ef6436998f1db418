"""Train a randomly initialised Hugging Face GPT-2 on text files, with any DeepSpeed JSON.

    python launch/train_hf_gpt2.py --deepspeed_config ds_configs/baseline_fp32.json
    deepspeed --num_gpus 2 launch/train_hf_gpt2.py --deepspeed_config ds_configs/zero2_bf16.json

Every torch model works the same way: build it, call `ds_efficient.initialize`, go on as with DeepSpeed.
"""

import argparse
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone that is not installed

import torch
import torch.distributed as dist

import ds_efficient
from ds_efficient.core.deepspeed_compat import quiet_logging
from ds_efficient.core.keys import Key
from ds_efficient.errors import USER_ERROR_EXIT, UserError


def parse_args() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Train a Hugging Face GPT-2 with any DeepSpeed JSON.")
    add = parser.add_argument
    add("--deepspeed_config", required=True, metavar="JSON", help="any DeepSpeed config")
    add("--data", nargs="+", metavar="FILE", help="text files; without: Python's help topics")
    add("--num-layers", type=int, default=4, help="transformer layers")
    add("--hidden-size", type=int, default=128, help="width")
    add("--num-attention-heads", type=int, default=4, help="attention heads")
    add("--seq-length", type=int, default=128, help="bytes a sample; each byte is a token")
    add("--micro-batch-size", type=int, default=8, help="where the JSON has no batch size")
    add("--lr", type=float, default=1e-3, help="where the JSON has no learning rate")
    add("--train-iters", type=int, default=300, help="optimizer steps")
    add("--log-interval", type=int, default=20, help="steps between lines")
    add("--save", metavar="DIR", help="folder for checkpoints, at the end and every --save-interval steps")
    add("--save-interval", type=int, default=100, help="steps between checkpoints")
    add("--load", metavar="DIR", help="folder to resume from, if it holds a checkpoint")
    add("--seed", type=int, default=1234, help="seed of weights and data order")
    add("--local_rank", type=int, default=-1, help="set by the launcher")
    args = parser.parse_args()
    if args.hidden_size % args.num_attention_heads:
        parser.error("--hidden-size: must be a multiple of --num-attention-heads")
    return args


def read_text(files: list[str] | None, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training and validation bytes (uint8, 1-D); of twenty stretches one is for validation."""
    try:
        text = b"\n".join(Path(name).read_bytes() for name in files or ())
    except OSError as error:
        raise UserError(f"--data {error.filename}: cannot be read ({error.strerror})") from error
    text = "\n".join(topics.values()).encode() if files is None else text
    rows = len(text) // (20 * length)
    if rows == 0:
        raise UserError(f"--data: {len(text)} bytes, but --seq-length {length} needs at least {20 * length}")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: rows * 20 * length].view(rows, 20, length)
    return data[:, :19].flatten(), data[:, 19].flatten()


def samples(data: torch.Tensor, count: int, length: int, key: Key) -> torch.Tensor:
    """Return `count` stretches (count, length), int64, that depend on `key` only."""
    draw = torch.Generator().manual_seed(key.value)
    starts = torch.randint(len(data) - length + 1, (count, 1), generator=draw)
    return data[starts + torch.arange(length)].long()


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """Return the model, equal on every rank; it draws nothing in training, so a resumed run is exact."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise UserError(f"transformers cannot be imported ({error}); pip install transformers") from error
    options: dict[str, Any] = {"vocab_size": 256, "n_positions": args.seq_length, "n_embd": args.hidden_size}
    options |= {"n_layer": args.num_layers, "n_head": args.num_attention_heads}
    options |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**options, bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        return GPT2LMHeadModel(config)


def deepspeed_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the checked JSON with a batch size, an optimizer and a learning rate where it has none."""
    config = dict(ds_efficient.load_config(args.deepspeed_config).deepspeed)
    if not {"train_batch_size", "train_micro_batch_size_per_gpu"} & set(config):
        config["train_micro_batch_size_per_gpu"] = args.micro_batch_size
    optimizer = dict(config.get("optimizer", {"type": "AdamW", "params": {"torch_adam": True}}))
    optimizer["params"] = {"lr": args.lr, **optimizer.get("params", {})}
    return {"steps_per_print": 2**31 - 1, **config, "optimizer": optimizer}


def train(args: argparse.Namespace) -> None:
    """Train, evaluate, save."""
    train_data, valid_data = read_text(args.data, args.seq_length)
    engine, _, _, _ = ds_efficient.initialize(model=build_model(args), config=deepspeed_config(args))
    if args.load and (Path(args.load) / "latest").exists():
        engine.load_checkpoint(args.load)
    micro, passes = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    rank, world, key = dist.get_rank(), dist.get_world_size(), Key(args.seed)
    held_out = samples(valid_data, 16, args.seq_length, key.fold("valid")).to(engine.device)

    def show_validation() -> None:
        with torch.no_grad():  # the model has no dropout to switch off
            loss = engine(input_ids=held_out, labels=held_out).loss
        if rank == 0:
            print(f"step {engine.global_steps} validation loss {float(loss):.4f}", flush=True)

    show_validation()
    while engine.global_steps < args.train_iters:
        drawn = samples(train_data, passes * world * micro, args.seq_length, key.fold(engine.global_steps))
        mean = torch.zeros((), device=engine.device)
        for batch in drawn.view(passes, world, micro, args.seq_length)[:, rank].to(engine.device):
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
            mean += loss.detach().float() / (passes * world)
        dist.all_reduce(mean)
        step = engine.global_steps
        if rank == 0 and (step % args.log_interval == 0 or step == args.train_iters):
            print(f"step {step} loss {float(mean)!r}", flush=True)
        if args.save and (step % args.save_interval == 0 or step == args.train_iters):
            engine.save_checkpoint(args.save)
    show_validation()


def main() -> int:
    """Run the script; users' mistakes become one message and exit status 2."""
    args = parse_args()
    quiet_logging()
    if "RANK" not in os.environ:  # no launcher: one process, any free port
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    try:
        train(args)
    except UserError as error:
        print(f"train_hf_gpt2.py: {error}" * (os.environ["RANK"] == "0"), file=sys.stderr, flush=True)
        return USER_ERROR_EXIT
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
