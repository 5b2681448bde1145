"""The sharded optimizer (ZeRO stage 1): one interface, `optimizer.build`, before two engines, ours and DeepSpeed's."""
