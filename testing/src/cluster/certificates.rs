//! The certificate authority of a cluster, and what it signed.

use std::{fs, path::Path};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};

/// Certificates and keys as PEM, by file name.
#[derive(Debug)]
pub(super) struct Certificates {
    files: Vec<(String, String)>,
}

impl Certificates {
    /// New ones; the API server's is for these names and addresses.
    pub(super) fn make(names: Vec<String>) -> Self {
        let key = new_key();
        let mut params = params("ambient test cluster", Vec::new());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca = params.self_signed(&key).expect("a certificate can be made");
        let mut made = Self {
            files: vec![("ca.crt".to_owned(), ca.pem())],
        };
        let issuer = Issuer::new(params, key);

        let mut server = self::params("kube-apiserver", names);
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        made.sign("api-server", &server, &issuer);

        // For logs and exec: the API server calls the kubelet.
        let mut client = self::params("kube-apiserver-kubelet-client", Vec::new());
        client
            .distinguished_name
            .push(DnType::OrganizationName, "system:masters");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        made.sign("kubelet-client", &client, &issuer);
        made
    }

    fn sign(&mut self, name: &str, params: &CertificateParams, issuer: &Issuer<'_, KeyPair>) {
        let key = new_key();
        let signed: Certificate = params
            .signed_by(&key, issuer)
            .expect("a certificate can be signed");
        self.files.push((format!("{name}.crt"), signed.pem()));
        self.files
            .push((format!("{name}.key"), key.serialize_pem()));
    }

    pub(super) fn write(&self, folder: &Path) {
        for (name, pem) in &self.files {
            fs::write(folder.join(name), pem).expect("disk is there");
        }
    }
}

fn new_key() -> KeyPair {
    KeyPair::generate().expect("a key can be made")
}

fn params(name: &str, names: Vec<String>) -> CertificateParams {
    let mut params = CertificateParams::new(names).expect("names fit a certificate");
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.use_authority_key_identifier_extension = true;
    params
}
