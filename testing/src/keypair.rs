//! RSA keys, fresh for each test run: none is kept in the repository.

use std::sync::OnceLock;

use aws_lc_rs::{
    encoding::{AsDer as _, Pkcs8V1Der},
    rand::SystemRandom,
    rsa::{KeyPair, KeySize},
    signature::RSA_PKCS1_SHA256,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rsa::{
    PrivateKey,
    pkcs1::EncodeRsaPrivateKey as _,
    pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _, EncodePublicKey as _, LineEnding},
    traits::PublicKeyParts as _,
};
use serde_json::{Value, json};

/// An RSA key and how it is written down.
#[derive(Debug)]
pub struct RsaKey {
    key: KeyPair,
    readable: PrivateKey,
}

impl RsaKey {
    /// A new key. 2048 bits take some 0.1 s, 4096 some 0.5 s.
    ///
    /// # Panics
    /// When the library refuses.
    pub fn generate(size: KeySize) -> Self {
        let key = KeyPair::generate(size).expect("a key can be made");
        let der: Pkcs8V1Der<'_> = key.as_der().expect("a key can be written");
        let readable = PrivateKey::from_pkcs8_der(der.as_ref()).expect("a new key can be read");
        Self { key, readable }
    }

    /// One key of 4096 bits for the whole process, as making one takes half a second.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<RsaKey> = OnceLock::new();
        SHARED.get_or_init(|| Self::generate(KeySize::Rsa4096))
    }

    /// `BEGIN RSA PRIVATE KEY`, as the keypair Secret holds it.
    pub fn private_pkcs1_pem(&self) -> String {
        let pem = self.readable.to_pkcs1_pem(LineEnding::LF);
        pem.expect("a key can be written").to_string()
    }

    /// `BEGIN PRIVATE KEY`.
    pub fn private_pkcs8_pem(&self) -> String {
        let pem = self.readable.to_pkcs8_pem(LineEnding::LF);
        pem.expect("a key can be written").to_string()
    }

    /// PKCS#8 without the PEM around it.
    pub fn private_pkcs8_der(&self) -> Vec<u8> {
        let der: Pkcs8V1Der<'_> = self.key.as_der().expect("a key can be written");
        der.as_ref().to_vec()
    }

    /// `BEGIN PUBLIC KEY`.
    pub fn public_pem(&self) -> String {
        let public = self.readable.to_public_key();
        let pem = public.to_public_key_pem(LineEnding::LF);
        pem.expect("a key can be written")
    }

    /// The public key as one entry of a JWKS.
    pub fn jwk(&self, kid: &str) -> Value {
        let public = self.readable.to_public_key();
        let number = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        json!({
            "kty": "RSA", "use": "sig", "alg": "RS256", "kid": kid,
            "n": number(&public.n_bytes()),
            "e": number(&public.e_bytes()),
        })
    }

    /// A JWT with these claims, signed RS256.
    ///
    /// # Panics
    /// When the library refuses to sign.
    pub fn sign_jwt(&self, kid: &str, claims: &Value) -> String {
        let header = json!({"alg": "RS256", "typ": "JWT", "kid": kid});
        let part = |json: &Value| URL_SAFE_NO_PAD.encode(json.to_string());
        let message = format!("{}.{}", part(&header), part(claims));
        let mut signature = vec![0; self.key.public_modulus_len()];
        self.key
            .sign(
                &RSA_PKCS1_SHA256,
                &SystemRandom::new(),
                message.as_bytes(),
                &mut signature,
            )
            .expect("a key can sign");
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};

    use super::*;

    #[test]
    fn a_jwt_verifies_with_the_published_key() {
        let key = RsaKey::generate(KeySize::Rsa2048);
        let jwt = key.sign_jwt("k", &json!({"sub": "me"}));
        let jwk = key.jwk("k");
        let bytes = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
        let (message, signature) = jwt.rsplit_once('.').unwrap();
        let public = RsaPublicKeyComponents {
            n: bytes(jwk["n"].as_str().unwrap()),
            e: bytes(jwk["e"].as_str().unwrap()),
        };
        public
            .verify(
                &RSA_PKCS1_2048_8192_SHA256,
                message.as_bytes(),
                &bytes(signature),
            )
            .unwrap();
        assert!(
            key.private_pkcs1_pem()
                .starts_with("-----BEGIN RSA PRIVATE KEY-----")
        );
        assert!(key.public_pem().starts_with("-----BEGIN PUBLIC KEY-----"));
    }
}
