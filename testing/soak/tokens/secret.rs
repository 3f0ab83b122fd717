//! Whose token is in a Secret.

use ambient_shared::token::Token;
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use serde::Deserialize;
use serde_json::Value;

/// The token in a session's Secret, if it is one of this session's run.
///
/// # Errors
/// What it is instead.
pub fn token_of(secret: &Value, session: &str, generation: u32) -> Result<Token, String> {
    let token = token_in(secret)?;
    owner(&token)?.check(session, generation)?;
    Ok(token)
}

fn token_in(secret: &Value) -> Result<Token, String> {
    let token = secret["data"]["api-token"].as_str();
    let token = STANDARD.decode(token.ok_or("there is none")?);
    let token = String::from_utf8(token.map_err(|error| error.to_string())?);
    let token = token.map_err(|error| error.to_string())?;
    Token::new(&token, None).map_err(|error| error.to_string())
}

/// Whose a token says it is. Its signature is for the API server to check.
#[derive(Deserialize)]
struct Owner {
    sub: String,
    #[serde(rename = "gen")]
    generation: u32,
    /// Without it, it would be taken to live on.
    #[serde(rename = "exp")]
    _exp: u64,
}

fn owner(token: &Token) -> Result<Owner, String> {
    let payload = token.expose().split('.').nth(1).ok_or("it is no JWT")?;
    let payload = URL_SAFE_NO_PAD.decode(payload);
    let claims = serde_json::from_slice(&payload.map_err(|error| error.to_string())?);
    claims.map_err(|error| format!("its claims cannot be read: {error}"))
}

impl Owner {
    fn check(&self, session: &str, generation: u32) -> Result<(), String> {
        if self.sub != format!("session:{session}") {
            return Err(format!("it is of {}", self.sub));
        }
        if self.generation != generation {
            let Self {
                generation: its, ..
            } = self;
            return Err(format!("it is of generation {its}, not {generation}"));
        }
        Ok(())
    }
}
