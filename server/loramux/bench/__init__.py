"""Loading a server open loop: what is asked and when, sending it, and what came of it."""
