"""One file a backend; none imports its library, or torch, before it is used."""
