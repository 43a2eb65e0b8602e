"""Readers of one subject each, all below an injectable root; ``Machine.probe`` assembles them."""
