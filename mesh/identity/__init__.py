"""Who may be in the mesh, and who said what: authority, certificates, invitations, key ring, revocation, tokens.

Start at `site.SiteIdentity` (every site) and `authority.Authority` (the site that made the cluster).
"""
