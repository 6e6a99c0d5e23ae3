"""Every decision of a merge, and every refusal: adapters + base -> Plan."""
