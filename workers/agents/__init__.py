"""Software agents: the registry, which agent a message is for, and the role that asks them and brings their answers
back through the same log as everybody's messages."""
