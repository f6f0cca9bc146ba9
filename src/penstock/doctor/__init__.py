"""What `penstock doctor` knows: judgements of facts, where the facts come from, and a storm to prove them."""
