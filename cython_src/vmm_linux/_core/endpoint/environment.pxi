"""The policy and the audit that the environment names, for a program that stays unedited."""

POLICY_VARIABLE = "VMM_LINUX_POLICY"
AUDIT_VARIABLE = "VMM_LINUX_AUDIT"
POLICY_MODULE = "vmm_linux.policy"
AUDIT_MODULE = "vmm_linux.audit"

# Imported with the package where they are named: the making of a VMM is no time for imports.
for variable, module in ((POLICY_VARIABLE, POLICY_MODULE), (AUDIT_VARIABLE, AUDIT_MODULE)):
    if os.environ.get(variable):
        __import__(module)


cdef object policy_of_environment():
    """The policy that the environment names, or None."""
    path = os.environ.get(POLICY_VARIABLE)
    if not path:
        return None
    return imports.needed("VMM", POLICY_MODULE).Policy.from_toml(path)


cdef object audit_of_environment(RuleTable policy):
    """The audit that the environment names, or None."""
    path = os.environ.get(AUDIT_VARIABLE)
    if not path:
        return None
    audit = imports.needed("VMM", AUDIT_MODULE)
    return audit.Audit(path, failure=(None if policy is None else policy.audit_failure) or "deny")
