"""Inside an enclave: sized before it is built, run in what it is allowed, fed once attested."""
